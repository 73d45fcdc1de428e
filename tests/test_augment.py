from collections import Counter
from math import atan, degrees

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import dataset
from engine import augment, stream

REFERENCE = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
OPS = list(REFERENCE._AUGMENTATION_SPACE)
LEVELS = {op: range(10) for op in OPS} | dict.fromkeys(
    ("AutoContrast", "Equalize", "Invert"), [None]
)

# share of pixels that lie between two: versions of torchvision (0.29 and before) round them
# otherwise
NEARLY = dict(Rotate=1e-4, ShearX=2e-3, ShearY=2e-3)


def by_torchvision(op, image, m):
    """The operation on one image, (3, H, W)."""
    plain = dict(angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, 0.0])
    slope = degrees(atan(m))
    return {
        "ShearX": lambda: tv.affine(image, **plain | dict(shear=[slope, 0.0], center=[0, 0])),
        "ShearY": lambda: tv.affine(image, **plain | dict(shear=[0.0, slope], center=[0, 0])),
        "TranslateX": lambda: tv.affine(image, **plain | dict(translate=[int(m), 0])),
        "TranslateY": lambda: tv.affine(image, **plain | dict(translate=[0, int(m)])),
        "Rotate": lambda: tv.rotate(image, m),
        "Brightness": lambda: tv.adjust_brightness(image, 1.0 + m),
        "Color": lambda: tv.adjust_saturation(image, 1.0 + m),
        "Contrast": lambda: tv.adjust_contrast(image, 1.0 + m),
        "Sharpness": lambda: tv.adjust_sharpness(image, 1.0 + m),
        "Posterize": lambda: tv.posterize(image, int(m)),
        "Solarize": lambda: tv.solarize(image, 255.0 * m),
        "AutoContrast": lambda: tv.autocontrast(image),
        "Equalize": lambda: tv.equalize(image),
        "Invert": lambda: tv.invert(image),
    }[op]()


def pictures(size):
    """Noise, noise of few greys, a grey image, one of one colour, one with an empty channel, a
    ramp."""
    pixels = torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8)
    pixels[1] = pixels[1] // 4 + 50
    pixels[2] = pixels[2, :1]
    pixels[3] = torch.tensor([7, 7, 200])[:, None, None]
    pixels[4, 1] = 0
    pixels[5] = torch.arange(size)
    return pixels


def test_the_policy_is_torchvision_s():
    assert augment.policy() == list(REFERENCE._policies)


@pytest.mark.parametrize("op", OPS)
def test_magnitudes_are_torchvision_s(op):
    find, signed = REFERENCE._AUGMENTATION_SPACE[op]
    assert signed == (op in augment.SIGNED)
    for size in (97, 112, 224):
        expected = find(10, size, size)
        for level in LEVELS[op]:
            value = 0.0 if level is None else float(expected[level])
            assert augment.magnitude(op, level, size) == value


@pytest.mark.parametrize("size", [pytest.param(97, marks=pytest.mark.slow), 112])
@pytest.mark.parametrize("op", OPS)
def test_an_operation_is_torchvision_s_image_by_image(op, size):
    """All levels and signs in one batch; bit for bit, but that of a rotation a few pixels may come
    from the neighbour: half-way between two, the last bit decides, which differs between CPUs."""
    signs = (1, -1) if op in augment.SIGNED else (1,)
    values = [s * augment.magnitude(op, level, size) for level in LEVELS[op] for s in signs]
    images, numbers, expected = [], [], []
    for m in values:
        function, *row = augment.numbers_of(op, m, size)
        for image in pictures(size):
            images.append(image)
            numbers.append(row + [0.0] * (augment.NUMBERS - len(row)))
            expected.append(by_torchvision(op, image, m))
    out = function(torch.stack(images), torch.tensor(numbers))
    other = (out != torch.stack(expected)).float().mean()
    assert out.dtype == torch.uint8 and other <= NEARLY.get(op, 0)


def draws(n, generator):
    """For each image the (operation, magnitude) that it gets, by hand."""
    policies = augment.policy()
    which = torch.randint(25, (n,), generator=generator).tolist()
    chance, sign = (torch.rand(2, n, generator=generator).T.tolist() for _ in range(2))
    for steps, chances, signs in zip((policies[i] for i in which), chance, sign):
        yield [
            (op, level, -1 if s <= 0.5 and op in augment.SIGNED else 1)
            for (op, p, level), c, s in zip(steps, chances, signs)
            if c <= p
        ]


def test_what_is_drawn_has_torchvision_s_probabilities():
    n = 50_000
    drawn = Counter(map(tuple, draws(n, torch.Generator().manual_seed(0))))
    expected = Counter()
    for steps in REFERENCE._policies:
        ways = []
        for op, p, level in steps:
            signs = (1, -1) if REFERENCE._AUGMENTATION_SPACE[op][1] else (1,)
            ways.append([((), 1 - p), *(([(op, level, s)], p / len(signs)) for s in signs)])
        for one, p in ways[0]:
            for two, q in ways[1]:
                expected[(*one, *two)] += p * q / len(REFERENCE._policies)
    assert sum(expected.values()) == pytest.approx(1) and not set(drawn) - set(expected)
    for way, p in expected.items():
        assert abs(drawn[way] / n - p) <= 5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("bounds", [[(0, 30), (30, 41)], [(3, 20), (25, 30)], [(0, 1)]])
def test_each_image_gets_what_was_drawn_for_it(bounds):
    n, size = 41, 97
    pixels = torch.cat([pictures(size)] * 7)[:n]
    drawn = list(draws(n, torch.Generator().manual_seed(1)))
    plan = augment.autoaugment(n, size, torch.Generator().manual_seed(1))
    augmented = augment.Augment(*plan, size, bounds, "cpu")
    for k, (start, stop) in enumerate(bounds):
        for i, out in zip(range(start, stop), augmented(k, pixels[start:stop].clone())):
            expected = pixels[i]
            for op, level, sign in drawn[i]:
                m = sign * augment.magnitude(op, level, size)
                expected = by_torchvision(op, expected, m)
            rotated = any(op == "Rotate" for op, *_ in drawn[i])
            assert (out != expected).float().mean() <= (1e-4 if rotated else 0)


def test_randaugment_draws_two_of_fourteen_evenly():
    n, size = 40_000, 32
    changes, row = augment.randaugment(n, size, torch.Generator().manual_seed(0))
    counts = Counter("Identity" if i == 0 else changes[i - 1][0] for i in row.flatten().tolist())
    assert len(counts) == 14 and row.shape == (2, n)
    for count in counts.values():
        assert abs(count / (2 * n) - 1 / 14) < 0.006
    spans = {op: [m for name, m in changes if name == op] for op in counts if op != "Identity"}
    for op, (low, high) in dict(
        Brightness=(-0.95, -0.05),
        Rotate=(-30, 30),
        ShearX=(-0.3, 0.3),
        TranslateY=(-9.6, 9.6),
        Posterize=(4, 8),
        Solarize=(0, 1),
    ).items():
        assert (min(spans[op]), max(spans[op])) == pytest.approx((low, high))
    first, second = row
    assert abs((first == second).float().mean().item() - 1 / (14 * 31) - 1 / 14**2) < 0.01


def test_cut_out_is_a_square_inside():
    pixels = torch.full((3, 3, 32, 32), 9, dtype=torch.uint8)
    square = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.0, 0.5], [0.5, 1.0, 0.5]])
    out = augment.cut_out(pixels, square)
    grey = out == 127
    assert grey.sum((1, 2, 3)).tolist() == [3 * 16 * 16, 3 * 4 * 4, 0]
    assert grey[0, :, 8:24, 8:24].all() and grey[1, :, :4, 28:].all()
    assert (out[~grey] == 9).all()


@pytest.mark.parametrize("img_size", [None, 48])
def test_the_strong_view(img_size):
    """Another view of the same images; the weak one, order and labels are those without it."""
    pixels = torch.randint(0, 256, (20, 24, 24, 3), dtype=torch.uint8)
    images = dataset.Images(
        pixels, torch.arange(20) % 4, list("abcd"), (0.5,) * 3, (0.25,) * 3, img_size=img_size
    )
    plain = list(stream.train_batches(images, 8, 1, 2))
    both = list(stream.train_batches(images, 8, 1, 2, two_views=True))
    again = list(stream.train_batches(images, 8, 1, 2, two_views=True, skip=1))
    side = img_size or 24
    for one, two in zip(plain, both, strict=True):
        for x, y in zip(one, two):
            assert torch.equal(x, y)
        assert two[3].shape == (len(two[1]), 3, side, side)
        assert two[3].is_contiguous(memory_format=torch.channels_last)
        assert not torch.equal(two[0], two[3])
    for x, y in zip(both[1], again[0]):
        assert torch.equal(x, y)

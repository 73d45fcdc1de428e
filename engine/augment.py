"""AutoAugment's policy for CIFAR-10, and RandAugment, on whole batches of images on their device.

As torchvision.transforms.v2.AutoAugment applies it to one tensor: the same chances, magnitudes and
pixels, but the images of a batch that get the same operation get it together, each with numbers of
its own. What an image gets is drawn before the epoch, so that no step waits for the device.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# what comes first and what second: an operation, its probability, its level of 0 to 9
POLICY = """
    Invert       0.1 -   Contrast     0.2 6
    Rotate       0.7 2   TranslateX   0.3 9
    Sharpness    0.8 1   Sharpness    0.9 3
    ShearY       0.5 8   TranslateY   0.7 9
    AutoContrast 0.5 -   Equalize     0.9 -
    ShearY       0.2 7   Posterize    0.3 7
    Color        0.4 3   Brightness   0.6 7
    Sharpness    0.3 9   Brightness   0.7 9
    Equalize     0.6 -   Equalize     0.5 -
    Contrast     0.6 7   Sharpness    0.6 5
    Color        0.7 7   TranslateX   0.5 8
    Equalize     0.3 -   AutoContrast 0.4 -
    TranslateY   0.4 3   Sharpness    0.2 6
    Brightness   0.9 6   Color        0.2 8
    Solarize     0.5 2   Invert       0.0 -
    Equalize     0.2 -   AutoContrast 0.6 -
    Equalize     0.2 -   Equalize     0.6 -
    Color        0.9 9   Equalize     0.6 -
    AutoContrast 0.8 -   Solarize     0.2 8
    Brightness   0.1 3   Color        0.7 0
    Solarize     0.4 5   AutoContrast 0.9 -
    TranslateY   0.9 9   TranslateY   0.7 9
    AutoContrast 0.9 -   Solarize     0.8 3
    Equalize     0.8 -   Invert       0.1 -
    TranslateY   0.7 9   AutoContrast 0.9 -
"""


TOP = dict(ShearX=0.3, ShearY=0.3, Rotate=30.0)  # magnitude at level 9; that of 0 is 0
TOP |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9)


SIGNED = {*TOP, "TranslateX", "TranslateY"}


NUMBERS = 6  # of an image, for whatever operation it gets


def policy() -> list[tuple[tuple[str, float, int | None], ...]]:
    """The sub-policies, each two (operation, probability, level)."""
    rows = (line.split() for line in POLICY.strip().splitlines())
    return [tuple((row[i], float(row[i + 1]), _level(row[i + 2])) for i in (0, 3)) for row in rows]


def _level(text: str) -> int | None:
    return None if text == "-" else int(text)


def magnitude(op: str, level: int | None, size: int) -> float:
    """What a level means, for images of `size` pixels; 0 where an operation has no levels."""
    if op == "Posterize":
        return round(8 - level * 4 / 9)  # bits that stay
    if op == "Solarize":
        return float(torch.linspace(1.0, 0.0, 10)[level])
    top = 150.0 / 331.0 * size if op.startswith("Translate") else TOP.get(op)
    return 0.0 if top is None else float(torch.linspace(0.0, top, 10)[level])


def autoaugment(n: int, size: int, generator) -> tuple[list[tuple[str, float]], Tensor]:
    """What AutoAugment does to `n` images: the changes that there are, and which of them each image
    gets first and second (2, n), counted from 1; 0 stands for none."""
    policies = policy()
    changes = [
        (op, sign * magnitude(op, level, size))
        for steps in policies
        for op, _, level in steps
        for sign in (1, -1 if op in SIGNED else 1)
    ]
    chances = torch.tensor([[p for _, p, _ in steps] for steps in policies])
    which = torch.randint(len(policies), (n,), generator=generator)
    applied = torch.rand(2, n, generator=generator) <= chances[which].T
    negative = torch.rand(2, n, generator=generator) <= 0.5
    row = 1 + 4 * which + 2 * torch.tensor([[0], [1]]) + negative
    return changes, torch.where(applied, row, 0)


LEVELS = 31  # of RandAugment's magnitudes


FACTORS = "Brightness", "Color", "Contrast", "Sharpness"


def randaugment(n: int, size: int, generator) -> tuple[list[tuple[str, float]], Tensor]:
    """The same of RandAugment as semi-supervised training has it: two of fourteen operations, the
    identity among them, each at a magnitude drawn evenly."""
    even = torch.linspace(0, 1, LEVELS).tolist()
    ways = {op: [(op, -0.95 + 0.9 * x) for x in even] for op in FACTORS}  # factors of 0.05 to 0.95
    for op, top in (("Rotate", 30.0), ("ShearX", 0.3), ("ShearY", 0.3)):
        ways[op] = [(op, top * (2 * x - 1)) for x in even]
    for op in ("TranslateX", "TranslateY"):
        ways[op] = [(op, 0.3 * size * (2 * x - 1)) for x in even]
    ways["Posterize"] = [("Posterize", round(4 + 4 * x)) for x in even]  # bits
    ways["Solarize"] = [("Solarize", x) for x in even]
    ways |= {op: [(op, 0.0)] * LEVELS for op in ("AutoContrast", "Equalize")}
    changes = [change for way in ways.values() for change in way]
    row = torch.randint((len(ways) + 1) * LEVELS, (2, n), generator=generator) + 1
    return changes, torch.where(row > len(changes), 0, row)


def cut_out(pixels: Tensor, square: Tensor) -> Tensor:
    """`pixels` (B, 3, S, S) with a grey square of up to half the side; `square` (3, B) in 0..1: its
    side and the place of its middle."""
    size = pixels.shape[-1]
    half, y, x = (square * torch.tensor([[0.25], [1.0], [1.0]], device=square.device)) * size
    place = torch.arange(size, device=pixels.device) + 0.5
    rows, columns = ((place - middle[:, None]).abs() < half[:, None] for middle in (y, x))
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return pixels.masked_fill(inside, 127)


class Augment:
    """Changes for the images of an epoch, in their order, whose batches have the `bounds`;
    `changes` and `row` as of `autoaugment`."""

    def __init__(
        self,
        changes: list[tuple[str, float]],
        row: Tensor,
        size: int,
        bounds: list[tuple[int, int]],
        device,
    ):
        # a row of numbers for each way in which an image can be changed; the first: not at all
        functions, kinds, rows = [None], [0], [[0.0] * NUMBERS]
        for op, value in changes:
            function, *numbers = numbers_of(op, value, size)
            if function not in functions:
                functions.append(function)
            kinds.append(functions.index(function))
            rows.append(numbers + [0.0] * (NUMBERS - len(numbers)))

        # each batch sorted by function; a group is (function, first or second, from, to)
        kinds, place, self.groups = torch.tensor(kinds), torch.zeros_like(row), []
        for start, stop in bounds:
            groups = []
            for i in (0, 1):
                kind = kinds[row[i, start:stop]]
                place[i, start:stop] = kind.argsort(stable=True)
                row[i, start:stop] = row[i, start:stop][place[i, start:stop]]
                ends = kind.bincount(minlength=len(functions)).cumsum(0).tolist()
                for function, a, b in zip(functions[1:], ends, ends[1:]):
                    if a < b:
                        groups.append((function, i, start + a, start + b))
            self.groups.append(groups)
        self.place = place.to(device, non_blocking=True)
        self.numbers = torch.tensor(rows)[row].to(device, non_blocking=True)

    def __call__(self, k: int, pixels: Tensor) -> Tensor:
        """Batch `k`, changed in place."""
        for function, i, start, stop in self.groups[k]:
            place = self.place[i, start:stop]
            group = pixels.index_select(0, place)
            pixels[place] = function(group, self.numbers[i, start:stop])
        return pixels


class StrongView:
    """RandAugment, then a square cut out: the changes for the second view of an epoch's images."""

    def __init__(self, n: int, size: int, generator, bounds: list[tuple[int, int]], device):
        self.augment = Augment(*randaugment(n, size, generator), size, bounds, device)
        self.square = torch.rand(3, n, generator=generator).to(device, non_blocking=True)
        self.bounds = bounds

    def __call__(self, k: int, pixels: Tensor) -> Tensor:
        """Batch `k`, changed in place."""
        start, stop = self.bounds[k]
        return cut_out(self.augment(k, pixels), self.square[:, start:stop])


class Rotation:
    """A rotation of each of an epoch's images by up to `most` degrees, as torchvision's
    RandomRotation: the nearest pixel, or black."""

    def __init__(self, n: int, size: int, generator, bounds, device, most: float = 20.0):
        angle = (torch.rand(n, generator=generator) * 2 - 1) * math.radians(most)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(n)
        numbers = torch.stack([cos, -sin, zero, sin, cos, zero], 1) / (size / 2)
        self.numbers, self.bounds = numbers.to(device, non_blocking=True), bounds

    def __call__(self, k: int, pixels: Tensor) -> Tensor:
        """Batch `k`."""
        start, stop = self.bounds[k]
        return affine(pixels, self.numbers[start:stop])


def autoaugment_view(
    n: int, size: int, generator, bounds: list[tuple[int, int]], device
) -> Augment:
    """AutoAugment's changes for an epoch's images."""
    return Augment(*autoaugment(n, size, generator), size, bounds, device)


# --- the operations: uint8 (B, 3, S, S) and float32 (B, NUMBERS) -> uint8 (B, 3, S, S) -----------


def numbers_of(op: str, magnitude: float, size: int) -> tuple:
    """The function of an operation, and its numbers; those that are factors are 1 + magnitude."""
    half, factor = size / 2, 1.0 + magnitude
    if op in ("ShearX", "ShearY"):
        x, y = (magnitude * (op[-1] == axis) for axis in "XY")
        return affine, *_scaled([1.0, x, x * half, y, 1.0, y * half], half)
    if op in ("TranslateX", "TranslateY"):
        x, y = (-int(magnitude) * (op[-1] == axis) for axis in "XY")
        return affine, *_scaled([1.0, 0.0, x, 0.0, 1.0, y], half)
    if op == "Rotate":
        angle = math.radians(-(magnitude % 360))
        cos, sin = math.cos(angle), math.sin(angle)
        return affine, *_scaled([cos, sin, 0.0, -sin, cos, 0.0], half)
    return {
        "Brightness": (blend, factor, 1 - factor, 0.0, 0.0),
        "Color": (blend, factor, 1 - factor, 1.0, 0.0),
        "Contrast": (blend, factor, 1 - factor, 0.0, 1.0),
        "Sharpness": (sharpness, 1 - factor),
        "Posterize": (posterize, 256 - 2 ** (8 - magnitude)),
        "Solarize": (solarize, 255.0 * magnitude),
        "Invert": (solarize, 0.0),
        "AutoContrast": (autocontrast,),
        "Equalize": (equalize,),
    }[op]


def _scaled(matrix: list[float], half: float) -> list[float]:
    return (torch.tensor(matrix) / half).tolist()


def _columns(numbers: Tensor) -> list[Tensor]:
    return [x.view(-1, 1, 1, 1) for x in numbers.unbind(1)]


def affine(pixels: Tensor, numbers: Tensor) -> Tensor:
    """Each pixel is the one nearest to where the matrix takes its place, or black."""
    size, device = pixels.shape[-1], pixels.device
    middle = torch.linspace((1.0 - size) * 0.5, (size - 1.0) * 0.5, size, device=device)
    x, y = middle.view(1, 1, -1, 1), middle.view(1, -1, 1, 1)
    a, b, c = (part.view(-1, 1, 1, 2) for part in numbers.view(-1, 2, 3).unbind(2))
    # no matrix product, which a GPU may round to ten bits
    grid = (x * a + y * b).add_(c)
    moved = F.grid_sample(pixels.float(), grid, mode="nearest", align_corners=False)
    return moved.to(torch.uint8)


def blend(pixels: Tensor, numbers: Tensor) -> Tensor:
    """Brightness, colour, contrast: towards black, each image's own grey, the grey of the whole
    image."""
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    factor, rest, own, whole, *_ = _columns(numbers)
    grey = rgb_to_grayscale(pixels).float()
    other = grey * own + grey.mean((1, 2, 3), keepdim=True) * whole
    mixed = pixels.float().mul_(factor).addcmul_(other, rest)
    return mixed.clamp_(0, 255).to(torch.uint8)


def sharpness(pixels: Tensor, numbers: Tensor) -> Tensor:
    """Away from, or towards, the mean of 3x3 pixels with five times the middle; not at the edge."""
    out = pixels.float()
    middle = out[..., 1:-1, 1:-1]
    total = (out[..., :-2, :] + out[..., 1:-1, :]).add_(out[..., 2:, :])
    total = (total[..., :-2] + total[..., 1:-1]).add_(total[..., 2:])
    mean = total.add_(middle, alpha=4).div_(13).round_()
    middle.addcmul_(mean.sub_(middle), numbers[:, :1, None, None])
    return out.clamp_(0, 255).to(torch.uint8)


def posterize(pixels: Tensor, numbers: Tensor) -> Tensor:
    return pixels & numbers[:, :1, None, None].to(torch.uint8)


def solarize(pixels: Tensor, numbers: Tensor) -> Tensor:
    threshold = numbers[:, :1, None, None].ceil().to(torch.uint8)
    return pixels ^ (pixels >= threshold).to(torch.uint8).mul_(255)


def autocontrast(pixels: Tensor, _) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.autocontrast(pixels)


def equalize(pixels: Tensor, _) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.equalize(pixels)

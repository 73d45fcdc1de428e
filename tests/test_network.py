import json
import math
from pathlib import Path

import pytest
from conftest import tiers
import torch
from fill import fill_network, image
from messages import refused
from reference import agree, agree_grads, cases
from torch import nn
from toys import Toy

import network
from engine import foreign
from engine.adapter import Adapter, Regressor, align, count_macs

EXPECTED = json.loads((Path(__file__).parent / "data" / "networks.json").read_text())
UNRECORDED = ("ResNet34", "ResNet101", "ResNet152")  # in no public table of models
ALL = ("stem", "stages", "preacts", "feat")
IMAGENET = "MobileNetV1"  # recorded, and in the tables, at 224 pixels with 1000 classes
ROWS = {IMAGENET: slice(1, -1), "ResNet18": slice(-1)}  # those recorded of stem, stages and feature
BIG = ("ResNet101", "ResNet152", "vgg16", "vgg19")  # each is another depth of a smaller one
NAMES = [pytest.param(x, marks=[pytest.mark.slow] * (x in BIG)) for x in network.NETWORKS]


def close(x, expected):
    """Mean, spread and first values of a map, as recorded."""
    assert list(x.shape) == expected["shape"]
    found = [x.mean().item(), x.std().item(), *x.flatten()[:4].tolist()]
    wanted = [expected["mean"], expected["std"], *expected["first"]]
    assert found == pytest.approx(wanted, rel=1e-7, abs=1e-9)


def test_every_network_has_its_values():
    assert sorted([*EXPECTED, *UNRECORDED]) == sorted(network.NETWORKS)


QUICK = ("resnet20", "resnet8x4", "wrn_16_2", "vgg8", "ResNet18", "MobileNetV2", "ShuffleV1")


@pytest.mark.parametrize("name", tiers(EXPECTED, *QUICK))
def test_agrees_with_the_public_network(name):
    """Keys, shapes, parameters, logits, feature maps after and before the last ReLU of a stage."""
    expected = EXPECTED[name]
    net = foreign.build(name, 1000 if name == IMAGENET else 100)
    assert [[k, list(v.shape)] for k, v in net.state_dict().items()] == expected["keys"]
    assert network.count_parameters(net) == expected["parameters"]
    with torch.no_grad():
        img = image(size=224 if name == IMAGENET else 32)
        s = network.Tapped(fill_network(net), ALL)(img)
    torch.testing.assert_close(
        s.out[:, :10], torch.tensor(expected["logits"], dtype=torch.float64), rtol=1e-8, atol=1e-10
    )
    rows = ROWS.get(name, slice(None))
    for x, wanted in zip([s.stem, *s.stages, s.feat][rows], expected["features"], strict=True):
        close(x, wanted)
    # the public code lists its stem after activation in both rows
    for x, wanted in zip([s.stem, *s.preacts, s.feat][rows], expected["preact"], strict=True):
        close(x, wanted)


COSTS = {  # parameters and multiply-adds with 100 classes at 32 pixels, measured on the public code
    "resnet8": (83_892, 12_507_392),
    "resnet14": (181_108, 26_663_168),
    "resnet20": (278_324, 40_818_944),
    "resnet32": (472_756, 69_130_496),
    "resnet44": (667_188, 97_442_048),
    "resnet56": (861_620, 125_753_600),
    "resnet110": (1_736_564, 253_155_584),
    "resnet8x4": (1_233_540, 177_071_104),
    "resnet32x4": (7_433_860, 1_083_040_768),
    "ResNet18": (11_220_132, 555_468_800),
    "ResNet34": (21_328_292, 1_159_448_576),
    "ResNet50": (23_705_252, 1_298_014_208),
    "ResNet101": (42_697_380, 2_510_168_064),
    "ResNet152": (58_341_028, 3_722_321_920),
    "wrn_16_1": (180_916, 26_663_168),
    "wrn_16_2": (703_284, 101_118_464),
    "wrn_40_1": (569_780, 83_286_272),
    "wrn_40_2": (2_255_156, 327_610_880),
    "vgg8": (3_965_028, 96_192_512),
    "vgg11": (9_277_284, 209_438_720),
    "vgg13": (9_462_180, 284_936_192),
    "vgg16": (14_774_436, 398_182_400),
    "vgg19": (20_086_692, 511_428_608),
    "MobileNetV2": (812_836, 6_523_648),
    "ShuffleV1": (949_258, 38_691_456),
    "ShuffleV2": (1_355_528, 44_504_448),
    IMAGENET: (4_231_976, 568_740_352),
}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_multiply_adds(name):
    num_class, size = (1000, 224) if name == IMAGENET else (100, 32)
    with torch.device("meta"):
        net = foreign.build(name, num_class).eval()
        macs = count_macs(net, lambda: net(torch.zeros(1, 3, size, size)))
    assert (network.count_parameters(net), macs) == COSTS[name]


def test_another_number_of_classes_costs_its_classifier():
    net = network.build("resnet20", 10).eval()
    assert network.count_parameters(net) == 272_474
    assert count_macs(net, lambda: net(torch.zeros(1, 3, 32, 32))) == 40_813_184


def test_no_two_networks_look_alike():
    """A checkpoint that does not say its network is recognised by its keys and shapes."""
    assert len({parameters for parameters, _ in COSTS.values()}) == len(network.NETWORKS)


@pytest.mark.parametrize("name", NAMES)
def test_no_batch_norm_runs_twice(name):
    """In training mode, with every feature caught, at a size that no table has."""
    net = foreign.build(name, 10).train()
    with torch.no_grad():
        s = network.Tapped(net, ALL)(torch.randn(2, 3, 16, 16))
    runs = {k: v.item() for k, v in net.named_buffers() if k.endswith("num_batches_tracked")}
    assert runs and set(runs.values()) == {1}
    for x in (s.out, s.stem, *s.stages, *s.preacts, s.feat):
        assert x.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_larger_images(name):
    """Every map is as much larger as the image is; VGG pools once more above 32 pixels."""
    net = foreign.build(name, 10).eval()
    with torch.no_grad():
        s = network.Tapped(net, ALL)(torch.randn(1, 3, 64, 64))
    rows = EXPECTED.get(name, EXPECTED["ResNet50"])["features"]
    recorded = [row["shape"][-1] for row in rows if len(row["shape"]) == 4]
    sizes = [x.shape[-1] * (224 if name == IMAGENET else 32) // 64 for x in s.stages]
    if name.startswith("vgg"):
        recorded[-1] //= 2
    assert sizes == recorded[-len(sizes) :]
    assert [x.shape for x in s.stages] == [x.shape for x in s.preacts]
    assert s.out.shape == (1, 10) and s.out.isfinite().all()
    assert s.feat.ndim == 2 and torch.equal(s.out, classifier(net)(s.feat))
    if name in UNRECORDED:
        for before, after in zip(s.preacts, s.stages, strict=True):
            assert (before < 0).any() and torch.equal(before.relu(), after)


def classifier(net):
    path, _, end = net.taps["feat"].partition(":")
    assert end == "in"
    return net.get_submodule(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_norms_run_last_before_the_preacts(name):
    with torch.device("meta"):
        net = foreign.build(name, 10).eval()
        ran, last = [], []
        for path, module in net.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda *_, path=path: ran.append(path))
        for path in net.taps["preacts"]:
            path, _, end = path.partition(":")
            module = net.get_submodule(path)
            hook = module.register_forward_pre_hook if end else module.register_forward_hook
            hook(lambda *_: last.append(ran[-1]))
        assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 10)
    shuffles = name.startswith("Shuffle")  # several batch norms, or none, meet at a pre-activation
    assert net.taps.get("norms") == (None if shuffles else last)
    assert len(last) == len(net.taps["preacts"])


@pytest.mark.parametrize("name", ["wrn_16_2", "vgg8", "MobileNetV2", "ResNet18", "ShuffleV2"])
def test_first_weights(name):
    """Normal with variance 2 / fan-out, a small classifier where a family has one, or torch's
    own."""
    net = foreign.build(name, 100)
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 4000]
    assert len(convs) > 2
    for conv in convs:
        own = 1 / math.sqrt(3 * conv.weight[0].numel())
        kaiming = math.sqrt(2 / (conv.out_channels * conv.weight[0, 0].numel()))
        wanted = own if name == "ShuffleV2" else kaiming
        assert conv.weight.std().item() == pytest.approx(wanted, rel=0.05)
        assert conv.bias is None or not conv.bias.any()
    linear = classifier(net)
    small = name in ("vgg8", "MobileNetV2")
    wanted = 0.01 if small else 1 / math.sqrt(3 * linear.in_features)
    assert linear.weight.std().item() == pytest.approx(wanted, rel=0.05)
    assert linear.bias.any() == (not small and name != "wrn_16_2")


def test_multiply_adds_of_a_transposed_convolution():
    """Each of the 16 input pixels meets each weight."""
    conv = nn.ConvTranspose2d(3, 5, 2, stride=2)
    assert count_macs(conv, lambda: conv(torch.zeros(1, 3, 4, 4))) == 16 * 3 * 5 * 4


def test_unknown_network():
    with refused("resnet21", "resnet20"):
        network.build("resnet21", 10)


# --- hooks ----------------------------------------------------------------------------------------


def test_hooks_catch_only_what_is_wanted():
    s = network.Tapped(Toy(), ("stages", "feat"), stages=(-1,))(torch.randn(2, 3, 8, 8))
    assert s.stem is None and s.preacts == [] and len(s.stages) == 1
    assert s.stages[0].shape == (2, 8, 2, 2) and s.feat.shape == (2, 8)


def test_before_and_after_the_activation():
    s = network.Tapped(Toy(), ALL)(torch.randn(2, 3, 8, 8))
    for before, after in zip(s.preacts, s.stages, strict=True):
        assert (before < 0).any()
        torch.testing.assert_close(before.relu(), after, rtol=0, atol=0)


def test_hooks_are_silent_outside_the_call():
    net = Toy()
    tapped = network.Tapped(net, ALL)
    first = tapped(torch.randn(2, 3, 8, 8))
    kept = first.stages[0].clone()
    net(torch.randn(5, 3, 8, 8))
    assert tapped._caught is None and torch.equal(first.stages[0], kept)
    with pytest.raises(RuntimeError):
        tapped(torch.randn(2, 4, 8, 8))  # one channel too many
    net(torch.randn(5, 3, 8, 8))
    assert tapped._caught is None, "a failed call leaves no open hooks"


def test_a_batch_norm_runs_once_a_call():
    net = network.build("resnet8", 10).train()
    network.Tapped(net, ALL)(torch.randn(4, 3, 32, 32))
    for name, buffer in net.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == 1


def test_align():
    shallow, deep = Toy(), Toy()
    deep.taps = dict(deep.taps, stages=["relu0", "relu1", "relu2", "relu3"])
    assert align(shallow, deep, None) == (-3, -2, -1)
    assert align(shallow, deep, (1, -1)) == (-3, -1)
    assert align(deep, shallow, (2,)) == (-3,)
    for stages in ((4,), (-4,), (0,)):
        with refused("--stages", *stages):
            align(shallow, deep, stages)
    with refused("--stages", 1):
        align(deep, shallow, (1,))  # the teacher has nothing next to the deep one's first


# --- adapters -------------------------------------------------------------------------------------


def two(needs, wants=ALL, widths=(3, 5, 7, 9), last=1):
    s = network.Tapped(Toy(widths, last=last), wants)(torch.randn(2, 3, 8, 8))
    t = network.Tapped(Toy(), wants)(torch.randn(2, 3, 8, 8))
    return Adapter(needs, wants, s, t), s, t


def test_adapter_supplies_channels_and_size():
    adapter, s, t = two("channels+size")
    new_s, new_t = adapter(s, t)
    for a, b in zip(
        [new_s.stem, *new_s.stages, new_s.feat], [new_t.stem, *new_t.stages, new_t.feat]
    ):
        assert a.shape == b.shape
    assert new_t.stages[2].shape == (2, 8, 1, 1), "the larger map is pooled, here the teacher's"
    torch.testing.assert_close(new_t.stages[2], t.stages[2].mean((2, 3), keepdim=True))
    assert s.stages[2].shape[1] == 9, "what came in is left as it was"
    assert network.count_parameters(adapter) > 0
    assert len(adapter.notes) == 10  # eight projections, two of them of pooled maps


def test_adapter_pools_without_parameters():
    adapter, s, t = two("size")
    new_s, new_t = adapter(s, t)
    assert new_s.stages[2].shape == (2, 9, 1, 1) and new_t.stages[2].shape == (2, 8, 1, 1)
    assert network.count_parameters(adapter) == 0


@pytest.mark.parametrize("case", [c for c in cases("fitnet") if "alt_mdistiller/loss" in c])
def test_regressor_of_the_crd_benchmark(case):
    """Every kind of convolution against the values of MDistiller's FitNet."""
    fm_s, fm_t = case.leaf("in/fm_s"), case["in/fm_t"]
    regressor = Regressor(fm_s.shape, fm_t.shape, relu=True).double()
    regressor.load_state_dict(case.group("param/alt_mdistiller.conv_reg."))
    fm = regressor(fm_s)
    agree(fm, case["alt_mdistiller/regressed"])
    loss = (fm - fm_t).square().mean()
    agree(loss, case["alt_mdistiller/loss"])
    grads = case.group("alt_mdistiller/grad_param/conv_reg.")
    leaves = {"fm_s": fm_s, **dict(regressor.named_parameters())}
    # a bias before batch norm has no gradient but rounding
    leaves.pop("conv.bias"), grads.pop("conv.bias")
    agree_grads(loss, leaves, {"fm_s": case["alt_mdistiller/grad/fm_s"], **grads})


def test_no_regressor_to_an_odd_size():
    with refused("4x4", "7x7", "--adapter channels+size"):
        Regressor(torch.Size([1, 3, 4, 4]), torch.Size([1, 3, 7, 7]), relu=False)


@pytest.mark.parametrize("needs", ["", "size", "channels+size"])
def test_adapter_leaves_equal_shapes_alone(needs):
    adapter, s, t = two(needs, widths=(4, 4, 8, 8), last=2)
    new_s, new_t = adapter(s, t)
    assert new_s is s and new_t is t and not adapter.notes
    assert network.count_parameters(adapter) == 0

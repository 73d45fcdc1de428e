import json
from pathlib import Path

import pytest
import torch
from torch import nn

import network
from fill import fill_network, image
from reference import agree, agree_grads, cases
from toys import Toy
from utils import UserError

EXPECTED = json.loads((Path(__file__).parent / "data" / "networks.json").read_text())
ALL = ("stem", "stages", "preacts", "feat")


def close(x, expected):
    """Mean, spread and first values of a map, as recorded."""
    assert list(x.shape) == expected["shape"]
    found = [x.mean().item(), x.std().item(), *x.flatten()[:4].tolist()]
    wanted = [expected["mean"], expected["std"], *expected["first"]]
    assert found == pytest.approx(wanted, rel=1e-7, abs=1e-9)


def test_every_network_has_its_values():
    assert set(EXPECTED) == set(network.NETWORKS)


@pytest.mark.parametrize("name", EXPECTED)
def test_agrees_with_the_public_network(name):
    """Keys, shapes, parameters, logits, feature maps after and before the last ReLU of a stage."""
    expected = EXPECTED[name]
    net = network.build(name, 100)
    assert [[k, list(v.shape)] for k, v in net.state_dict().items()] == expected["keys"]
    assert network.count_parameters(net) == expected["parameters"]
    with torch.no_grad():
        s = network.Tapped(fill_network(net), ALL)(image())
    torch.testing.assert_close(
        s.out[:, :10], torch.tensor(expected["logits"], dtype=torch.float64), rtol=1e-8, atol=1e-10
    )
    for x, wanted in zip([s.stem, *s.stages, s.feat], expected["features"], strict=True):
        close(x, wanted)
    # the public code lists its stem after activation in both rows
    for x, wanted in zip([s.stem, *s.preacts, s.feat], expected["preact"], strict=True):
        close(x, wanted)


@pytest.mark.parametrize(
    "name, num_class, macs", [("resnet20", 10, 40_813_184), ("resnet8x4", 100, 177_071_104)]
)
def test_multiply_adds(name, num_class, macs):
    net = network.build(name, num_class).eval()
    assert network.count_macs(net, lambda: net(torch.zeros(1, 3, 32, 32))) == macs


def test_multiply_adds_of_a_transposed_convolution():
    """Each of the 16 input pixels meets each weight."""
    conv = nn.ConvTranspose2d(3, 5, 2, stride=2)
    assert network.count_macs(conv, lambda: conv(torch.zeros(1, 3, 4, 4))) == 16 * 3 * 5 * 4


def test_unknown_network():
    with pytest.raises(UserError, match="resnet20"):
        network.build("resnet21", 10)


# --- weights ---------------------------------------------------------------------------------------


def test_weights_in_any_wrapping():
    state = network.build("resnet8", 7).state_dict()
    zoo = {
        "module." + k.replace("layer", "res").replace("downsample", "ds"): v
        for k, v in state.items()
    }
    for checkpoint in (
        state,
        {"net": state},
        {"snet": state, "epoch": 3},
        {"model": zoo},
        {"net": zoo},
    ):
        found = network.read_weights(checkpoint)
        assert network.identify(found) == ("resnet8", 7)
        net = network.build("resnet8", 7)
        network.load_weights(net, found, "x.pth", "resnet8")
        torch.testing.assert_close(dict(net.state_dict()), dict(state), rtol=0, atol=0)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda state: state.pop("fc.bias"), r"1 missing \(fc.bias\)"),
        (lambda state: state.update(extra=torch.zeros(1)), r"1 unknown \(extra\)"),
        (
            lambda state: state.update({"fc.bias": torch.zeros(3)}),
            r"1 of another shape \(fc.bias\)",
        ),
        (lambda state: state.clear(), "missing"),
    ],
)
def test_nothing_is_loaded_by_halves(spoil, message):
    net = network.build("resnet8", 10)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = network.build("resnet8", 10).state_dict()
    spoil(state)
    with pytest.raises(UserError, match=message):
        network.load_weights(net, state, "x.pth", "resnet8")
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


def test_the_network_that_fits_is_named():
    state = network.build("resnet14", 100).state_dict()
    with pytest.raises(UserError, match="fits resnet14 with 100 classes"):
        network.load_weights(network.build("resnet8", 100), state, "x.pth", "resnet8")


# --- hooks -----------------------------------------------------------------------------------------


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
    assert network.align(shallow, deep, None) == (-3, -2, -1)
    assert network.align(shallow, deep, (1, -1)) == (-3, -1)
    assert network.align(deep, shallow, (2,)) == (-3,)
    for stages in ((4,), (-4,), (0,)):
        with pytest.raises(UserError, match="no stage"):
            network.align(shallow, deep, stages)
    with pytest.raises(UserError, match="no stage 1"):
        network.align(deep, shallow, (1,))  # the teacher has nothing beside the deep one's first


# --- adapters --------------------------------------------------------------------------------------


def two(needs, wants=ALL, widths=(3, 5, 7, 9), last=1):
    s = network.Tapped(Toy(widths, last=last), wants)(torch.randn(2, 3, 8, 8))
    t = network.Tapped(Toy(), wants)(torch.randn(2, 3, 8, 8))
    return network.Adapter(needs, wants, s, t), s, t


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
    regressor = network.Regressor(fm_s.shape, fm_t.shape, relu=True).double()
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
    with pytest.raises(UserError, match="no regressor"):
        network.Regressor(torch.Size([1, 3, 4, 4]), torch.Size([1, 3, 7, 7]), relu=False)


@pytest.mark.parametrize("needs", ["", "size", "channels+size"])
def test_adapter_leaves_equal_shapes_alone(needs):
    adapter, s, t = two(needs, widths=(4, 4, 8, 8), last=2)
    new_s, new_t = adapter(s, t)
    assert new_s is s and new_t is t and not adapter.notes
    assert network.count_parameters(adapter) == 0

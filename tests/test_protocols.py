"""What recipes share: pieces of a batch, smoothed labels, warm-ups, and what one has of another."""

import pytest
import torch
import torch.nn.functional as F
import toys

import network
import train_base
import train_kd
import utils
from engine.checkpoint import Weights
from engine.run import read_metrics
from engine.published import LIKE, REVIEWED, SETTINGS, settings_of
from engine.settings import settings
from kd_losses import METHODS
from kd_losses._wiring import reviewed

CPU = utils.Precision()


@pytest.mark.parametrize(
    "n, count, sizes", [(8, 3, [3, 3, 2]), (5, 4, [3, 2]), (3, 3, [3]), (1, 2, [1])]
)
def test_pieces_are_never_single_images(n, count, sizes):
    x = torch.arange(n)
    found = list(utils.micro_batches(count, x, 2 * x))
    assert [len(parts[0]) for parts, _ in found] == sizes
    assert sum(share for _, share in found) == pytest.approx(1)
    assert torch.equal(torch.cat([parts[1] for parts, _ in found]), 2 * x)


@pytest.mark.parametrize("mode", ["st", "at", "sobolev"])
def test_a_batch_in_pieces_is_the_batch(mode):
    """For losses that compare no images, batch norm in eval mode."""
    found = []
    for pieces in (1, 3):
        torch.manual_seed(0)
        distiller = toys.distiller(mode)
        for module in (distiller.student.net, distiller.teacher.net, distiller.added):
            module.double()
        params = distiller.set_trainable(distiller.phases[0])
        distiller.student.net.eval()
        optimizer = torch.optim.SGD(params, lr=0.0)
        torch.manual_seed(1)
        batch, phase = toys.batch(8), distiller.phases[0]
        terms = train_kd.train_step(
            distiller, phase, optimizer, batch, toys.weights(distiller, 2.0), CPU, pieces
        )
        found.append((terms, [p.grad for p in params]))
    (whole, grads), (cut, others) = found
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], check_dtype=False)
    torch.testing.assert_close(others, grads)


def test_a_plain_step_in_pieces_and_with_smoothed_labels():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4)).double()
    img, target = torch.randn(7, 3, 2, 2, dtype=torch.float64), torch.arange(7) % 4
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    found = []
    for pieces in (1, 3):
        out, loss = train_base.train_step(net, optimizer, img, target, CPU, 0.1, pieces)
        found.append((out, loss, net[1].weight.grad.clone()))
    torch.testing.assert_close(*found)
    log_p = F.log_softmax(net(img), 1)
    wanted = -(0.9 * log_p[range(7), target] + 0.1 * log_p.mean(1)).mean()
    torch.testing.assert_close(found[0][1].double(), wanted, rtol=1e-6, atol=1e-6)


def test_accumulate_trains(tmp_path):
    argv = ["--net_name", "resnet8", "--data_name", "digits", "--img_size", "12", "--cuda", "0"]
    argv += ["--epochs", "1", "--save_root", str(tmp_path), "--accumulate", "2"]
    argv += ["--label_smoothing", "0.1"]
    row = read_metrics(train_base.main(argv)["dir"])[0]
    assert 0 < row["ce"] < 3


def test_the_rate_warms_up_then_falls():
    rates = [utils.step_decay(1.0, epoch, (6,), 4) for epoch in range(1, 8)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1])
    assert utils.step_decay(1.0, 1, (6,)) == 1


def test_a_protocol_has_of_another_what_it_does_not_say():
    for protocol, parent in LIKE.items():
        for mode in METHODS:
            if mode not in SETTINGS[protocol]:
                assert settings_of(mode, protocol) == settings_of(mode, parent), (mode, protocol)
    st = settings("st", "mdistiller-imagenet", "", "", 1000)
    assert (st.lambda_kd, st.flags["T"]) == (0.5, 1.0)
    ofd = settings("ofd", "mdistiller-imagenet", "", "", 1000)
    assert (ofd.reduce, ofd.origin["reduce"]) == ("sum", "crd")
    assert ofd.origin["lambda_kd"] == "mdistiller-imagenet"
    assert not settings_of("bss", "mdistiller-imagenet")


@pytest.mark.parametrize(
    "flags, batch, lr",
    [
        (["--kd_mode", "st"], 512, 0.2),
        (["--kd_mode", "crd"], 256, 0.1),
        (["--kd_mode", "crd+ofd", "--lambda_kd", "1,1"], 128, 0.05),
        (["--kd_mode", "crd", "--batch_size", "64"], 64, 0.025),
        (["--kd_mode", "crd", "--lr", "0.3"], 256, 0.3),
        (["--kd_mode", "crd", "--protocol", "crd"], 64, 0.05),
        (["--kd_mode", "crd", "--protocol", "crd", "--batch_size", "128"], 128, 0.05),
    ],
)
def test_batch_and_rate(flags, batch, lr):
    protocol = [] if "--protocol" in flags else ["--protocol", "mdistiller-imagenet"]
    args, rows = toys.parse([*flags, *protocol, "--data_name", "imagenet"])
    recipe = toys.cfg(args, "torchvision/resnet18")
    assert (recipe.batch_size, recipe.lr) == (batch, pytest.approx(lr))


BASIC, BOTTLENECK = [64, 128, 256, 512, 512], [256, 512, 1024, 2048, 2048]
WIDTHS = {
    "mobilenet_v2": [144, 192, 576, 960, 1280],  # of the depthwise convolutions, and of the last
    **dict.fromkeys(["resnet18", "resnet34"], BASIC),
    **dict.fromkeys(["resnet50", "resnet101", "resnet152"], BOTTLENECK),
    **dict.fromkeys(["resnext50_32x4d", "resnext101_32x8d"], BOTTLENECK),
}
LARGE = ("resnet101", "resnet152", "resnext101_32x8d")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in LARGE)) for x in WIDTHS]
)
def test_levels_of_knowledgereview(name):
    """Five levels, before the activations."""
    row = settings("reviewkd", "knowledgereview", "", "", 100)
    widths, name = WIDTHS[name], f"torchvision/{name}"
    net = Weights(name, taps=row.taps[name]).build(100, 1, 64).eval()
    tapped = network.Tapped(net, ["stages", "preacts", "feat"])
    with torch.no_grad():
        s = tapped(torch.randn(2, 3, 64, 64))
    fms_s, fms_t = reviewed(s, s, row.flags["s_preact"], row.flags["pooled"])
    assert [fm.shape[1:] for fm in fms_t] == [
        (width, side, side) for width, side in zip(widths, (16, 8, 4, 2, 2))
    ]
    for before, other, after in zip(fms_s, fms_t, s.stages, strict=True):
        assert before is other and (before < 0).any() and (after >= 0).all()
        assert torch.equal(before.clamp(0, 6 if "mobilenet" in name else None), after)


def test_every_network_of_knowledgereview_has_its_levels():
    by_pair = SETTINGS["knowledgereview"]["reviewkd"]["pairs"]
    assert {name for pair in by_pair for name in pair} <= set(REVIEWED)
    assert {f"torchvision/{name}" for name in WIDTHS} == set(REVIEWED)
    pairs = {("resnet50", "mobilenet_v2"): (7.0, 256), ("resnet152", "resnet50"): (6.0, 512)}
    for pair, expected in pairs.items():
        names = (f"torchvision/{name}" for name in pair)
        own = settings("reviewkd", "knowledgereview", *names, 100)
        assert (own.lambda_kd, own.flags["mid_channel"]) == expected


def test_a_dry_run_of_reviewkd_s_imagenet(distil, capsys):
    """Both networks are ResNets here, whose images are the digits."""
    argv = ["--protocol", "reviewkd-imagenet", "--dry_run"]
    distil("reviewkd", *argv)
    distil("reviewkd", *argv, "--batch_size", "512", "--epochs", "10")
    distil("st", *argv)
    out = capsys.readouterr().out
    for line in (
        "lr 0.1, falls after (30, 60, 90), momentum 0.9, weight decay 0.0001, batch 256",
        "lr 0.2, falls after (3, 6, 9), momentum 0.9, weight decay 0.0001, batch 512",
        "reviewkd: lambda_kd 1.0 (reviewkd-imagenet), lambda_ce 1.0, stages [-3, -2, -1], "
        "reduce mean, mid_channel 512 (reviewkd-imagenet), s_preact True (reviewkd-imagenet)",
        "phases: distil 100 epoch(s)",
        "protocol reviewkd-imagenet has no settings for st",
    ):
        assert line in out, line

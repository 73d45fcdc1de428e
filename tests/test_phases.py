"""What trains in each phase, with which weight and in which mode: the behaviour that decides a
table and that no value of a loss shows."""

import math
from argparse import Namespace

import pytest
import torch
import toys
from PIL import Image

import conftest
import network
import train_base
import train_kd
import utils
from engine import foreign, published, schedule
from engine.run import read_metrics
from engine.settings import settings
from kd_losses import METHODS

CPU = utils.Precision()
CRD, IMAGENET = "crd", "mdistiller-imagenet"


def settings_of(mode, protocol="kdzoo", pair=("", "")):
    return settings(mode, protocol, *pair, num_class=100)


def weights(mode, protocol, epochs, pair=("", ""), phase=-1):
    """The weight of the method in the given epochs of the protocol's number."""
    distiller = toys.distiller(mode, argv=["--protocol", CRD] if protocol == CRD else [])
    total = published.PROTOCOLS[protocol].epochs
    distiller.added[0].settings = settings_of(mode, protocol, pair)
    cfg = Namespace(protocol=protocol)
    phase = distiller.phases[phase]
    return [
        schedule.loss_weights(distiller, phase, (epoch - 1) / total, cfg)["kd"] for epoch in epochs
    ]


def step(distiller, phase, batch, lr=0.0):
    cfg = Namespace(lr=lr, momentum=0.9, weight_decay=0.0, nesterov=0)
    optimizer = utils.sgd(distiller.param_groups(phase), cfg)
    ones = toys.weights(distiller)
    return train_kd.train_step(distiller, phase, optimizer, batch, ones, CPU)


# --- a phase has its own weight -------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["kdzoo", CRD])
def test_the_paraphraser_learns_by_the_plain_error(protocol):
    assert weights("ft", protocol, [1, 30], phase=0) == [1.0, 1.0]
    assert weights("ft", protocol, [1, 30], phase=1) == [200.0, 200.0]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--protocol", CRD], []])
def test_ft_trains_through(tmp_path, flags):
    """Without batch norm in the paraphraser: under crd, and above ten classes."""
    if not flags:
        for split, n in (("train", 6), ("test", 1)):
            for label in range(20):
                folder = tmp_path / "images" / split / f"{label:02d}"
                folder.mkdir(parents=True)
                for i in range(n):
                    color = (12 * label, 40 * i, 255 - 12 * label)
                    Image.new("RGB", (12, 12), color).save(folder / f"{i}.png")
        flags = ["--data_name", "imagefolder", "--img_root", tmp_path / "images"]
        files = ["--t_name", "resnet14", "--s_name", "resnet8", "--save_root", tmp_path]
        torch.manual_seed(0)
        teacher = tmp_path / "teacher.pth.tar"
        torch.save(dict(net=network.build("resnet14", 20).state_dict()), teacher)
        argv = ["--kd_mode", "ft", "--t_model", teacher, *files, *flags, "--epochs", "4"]
        result = train_kd.main([str(x) for x in [*argv, "--cuda", "0", "--note", "ft"]])
    else:  # a teacher that has learnt something: maps of one at chance are ten times as large
        where = ["--save_root", str(tmp_path), "--note"]
        argv = ["--net_name", "resnet14", *conftest.DIGITS, "--epochs", "2"]
        train_base.main([*argv, *where, "teacher"])
        files = ["--t_model", str(tmp_path / "teacher" / "model_best.pth.tar")]
        argv = ["--kd_mode", "ft", *files, "--s_name", "resnet8", *flags, "--epochs", "4"]
        result = train_kd.main([*argv, "--cuda", "0", *where, "ft"])
    rows = read_metrics(result["dir"])
    assert [row["phase"] for row in rows][:1] == ["paraphrase"] and rows[-1]["phase"] == "distil"
    assert all(math.isfinite(row["kd"]) for row in rows)


@pytest.mark.slow
def test_a_weight_that_starts_at_zero(distil):
    """The method's own parameters get their first gradient, and their momentum, in a later step."""
    rows = read_metrics(distil("reviewkd", "--protocol", "reviewkd", "--epochs", "1")["dir"])
    assert rows[0]["kd"] > 0


# --- what learns, and in which mode ---------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, protocol, name, rests",
    [
        ("ab", CRD, "wrn_16_1", ("bn1", "fc")),
        ("fsp", CRD, "MobileNetV2", ("conv2", "classifier")),
        ("ab", CRD, "resnet8", ("fc",)),
        ("ab", "kdzoo", "wrn_16_1", ("fc",)),
    ],
)
def test_the_first_phase_trains_the_feature_path(mode, protocol, name, rests):
    nets = [foreign.build(name, 5).requires_grad_(False) for _ in "st"]
    distiller = toys.distiller(mode, *nets, toys.images(size=32), argv=["--protocol", protocol])
    distiller.set_trainable(distiller.phases[0])
    for path, module in nets[0].named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            learns = path.split(".")[0] not in rests
            assert module.training == learns, path
            assert all(p.requires_grad == learns for p in module.parameters(recurse=False)), path


def test_the_public_connector_is_the_identity_where_the_maps_agree():
    distiller = toys.distiller("ab", toys.Toy(), toys.Toy(), argv=["--protocol", CRD])
    assert not list(distiller.added.parameters())
    distiller = toys.distiller("ab", toys.Toy((4, 4, 6, 8)), toys.Toy(), argv=["--protocol", CRD])
    assert {key.split(".")[3] for key in distiller.added.state_dict()} == {"preacts1"}
    distiller = toys.distiller("fitnet", toys.Toy(), toys.Toy(), argv=["--protocol", CRD])
    assert list(distiller.added.parameters())  # of fitnet there is always one


@pytest.mark.parametrize("protocol, batch_statistics", [("kdzoo", 0), (CRD, 1), (IMAGENET, 1)])
def test_the_teacher_of_ofd(protocol, batch_statistics):
    """Under MDistiller's recipes its batch norms use the batch's statistics; the running ones
    rest."""
    nets = [foreign.build(name, 5).requires_grad_(False) for name in ("resnet8", "resnet14")]
    distiller = toys.distiller("ofd", *nets, toys.images(size=16), argv=["--protocol", protocol])
    batch, phase = toys.batch(dtype=torch.float32, size=16), distiller.phases[0]
    before = {k: v.clone() for k, v in nets[1].state_dict().items()}
    value = step(distiller, phase, batch)["kd"]
    assert all(m.training == bool(batch_statistics) for m in nets[1].modules())
    after = nets[1].state_dict()
    assert all(torch.equal(x, after[k]) for k, x in before.items())

    def loss(training):  # by hand
        nets[0].train(), nets[1].train(training)
        with torch.no_grad():
            t, s = distiller.teacher(batch.img), distiller.student(batch.img)
            part = distiller.added[0]
            return part(s, t, batch, phase.inputs)

    torch.testing.assert_close(loss(bool(batch_statistics)), value, rtol=1e-4, atol=1e-6)
    assert not math.isclose(loss(not batch_statistics), value, rel_tol=1e-2)
    for m in nets[1].modules():
        m.train(False)
    step(distiller, phase, batch)  # evaluation puts it into eval mode, the next epoch back
    assert nets[1].training == bool(batch_statistics)


# --- bss: which images pass through the student ---------------------------------------------------


class Always(torch.nn.Module):
    """A student or teacher whose logits say the given class for each image of a batch."""

    def __init__(self, net, classes):
        super().__init__()
        self.net, self.classes, self.taps, self.seen = net, classes, net.taps, []

    def forward(self, img):
        self.seen.append(len(img))
        out = self.net(img)
        if len(self.seen) == 1:
            out = out + 1000 * torch.nn.functional.one_hot(self.classes, out.shape[1])
        return out


@pytest.mark.parametrize("right", [0, 1, 3])
def test_bss_forwards_what_qualifies_alone(right):
    batch = toys.batch(dtype=torch.float32)
    said = batch.target.clone()
    said[right:] = (said[right:] + 1) % 5
    distiller = toys.distiller("bss", toys.Toy(), toys.Toy())
    distiller.student.net, distiller.teacher.net = (
        Always(toys.Toy(), x) for x in (said, batch.target)
    )
    distiller.deployed = distiller.student.net
    terms = step(distiller, distiller.phases[0], batch)
    assert distiller.student.net.seen == [8] + [max(2, right)] * (right > 0)
    assert terms["kd"].isfinite() and (terms["kd"] == 0) == (right == 0)


# --- what the public codes set --------------------------------------------------------------------

MV1, R18 = (
    ("torchvision/resnet50", "MobileNetV1"),
    ("torchvision/resnet34", "torchvision/resnet18"),
)


@pytest.mark.parametrize(
    "mode, pair, weight, flags",
    [
        ("rld", MV1, 1.0, dict(beta=2.0)),
        ("rld", R18, 1.0, dict(beta=0.5)),
        ("wkd_f", MV1, 0.005, dict(ratio=2.0, grid=4)),
        ("wkd_f", R18, 0.02, dict(ratio=2.0, grid=4)),
        ("wkd_l", MV1, 1.0, dict(weight=25.0, sharpen=2.0)),
    ],
)
def test_settings_on_imagenet(mode, pair, weight, flags):
    row = settings_of(mode, IMAGENET, pair)
    assert row.lambda_kd == weight and flags.items() <= row.flags.items()


@pytest.mark.parametrize("mode", ["wkd_l", "wkd_f"])
@pytest.mark.parametrize("pair", [MV1, R18])
def test_the_batch_of_wkd_on_imagenet(mode, pair):
    argv = ["--kd_mode", mode, "--protocol", IMAGENET, "--data_name", "imagenet"]
    args, rows = toys.parse(argv, *pair)
    cfg = toys.cfg(args, pair[1])
    assert (cfg.batch_size, cfg.lr) == (256, pytest.approx(0.1))


def cosine(epoch, start, end):
    return (1 + math.cos(math.pi * max(epoch - start, 0) / (end - start))) / 2


@pytest.mark.parametrize(
    "mode, protocol, pair, expected",
    [
        ("reviewkd", "reviewkd", ("", ""), {1: 0.0, 2: 0.25, 11: 2.5, 21: 5.0, 240: 5.0}),
        ("reviewkd", CRD, ("", ""), {1: 0.25, 20: 5.0}),
        ("dkd", CRD, ("", ""), {1: 0.05, 20: 1.0}),
        ("rld", CRD, ("", ""), {1: 0.05, 20: 1.0}),
        ("rld", IMAGENET, R18, {1: 1.0}),
        ("wkd_f", CRD, ("", ""), {e: 0.08 * cosine(e, 150, 240) for e in (1, 150, 200, 239)}),
        ("wkd_f", IMAGENET, R18, {e: 0.02 * cosine(e, 0, 100) for e in (1, 30, 60, 99)}),
        ("wkd_f", IMAGENET, MV1, {e: 0.005 * cosine(e, 30, 100) for e in (1, 30, 60, 99)}),
    ],
)
def test_the_weight_over_the_epochs(mode, protocol, pair, expected):
    found = weights(mode, protocol, expected, pair)
    assert found == pytest.approx(list(expected.values()), abs=1e-9)


@pytest.mark.parametrize("protocol, start, total", [(CRD, 150, 240), (IMAGENET, 0, 100)])
def test_the_transport_of_wkd_l_fades(protocol, start, total):
    distiller = toys.distiller("wkd_l", argv=["--protocol", protocol, "--weight", "1"])
    part, out = distiller.added[0], torch.randn(6, 5)
    part.loss.cost.fill_(1.0).fill_diagonal_(0.0)
    s, t = (network.Features(x, None) for x in (out, out.flip(0)))
    batch = distiller.batch(None, torch.arange(6) % 5, None)

    def value(epoch):
        distiller.set_epoch(epoch, total)
        return part(s, t, batch)

    target = part.loss(out, out.flip(0), batch.target, 0.0)
    full = part.loss(out, out.flip(0), batch.target, 1.0) - target
    for epoch in (1, total // 2, total - 5):
        expected = target + cosine(epoch, start, total) * full
        torch.testing.assert_close(value(epoch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher, weight", [("wrn_40_2", 9.0), ("vgg13", 9.0), ("ResNet50", 1.0)])
def test_lskd_by_the_pair(teacher, weight):
    row = settings_of("lskd", CRD, (teacher, "MobileNetV2"))
    assert (row.flags["T"], row.lambda_kd) == (3.0, weight)


@pytest.mark.parametrize(
    "protocol, teacher_bn",
    [("reviewkd", "batch"), ("reviewkd-imagenet", "running"), ("knowledgereview", "running")],
)
def test_the_teacher_of_reviewkd(protocol, teacher_bn):
    assert settings_of("reviewkd", protocol).teacher_bn == teacher_bn


@pytest.mark.parametrize("mode", ["vid", "ft"])
def test_layers_start_as_the_public_code_leaves_them(mode):
    """Under crd with torch's own initialisation, whose weights lie within 1 / sqrt(fan in)."""

    def inside(protocol):
        torch.manual_seed(0)
        distiller = toys.distiller(mode, argv=["--protocol", protocol])
        convs = [m for m in distiller.added.modules() if isinstance(m, torch.nn.Conv2d)]
        assert convs
        return all(m.weight.abs().max() <= m.weight[0].numel() ** -0.5 for m in convs)

    assert inside(CRD) and not inside("kdzoo")


def test_the_least_variance_of_vid_and_the_epsilon_of_pkt():
    least = {p: settings_of("vid", p).flags["eps"] for p in ("kdzoo", CRD)}
    assert least == {"kdzoo": 1e-6, CRD: 1e-5}
    eps = {p: settings_of("pkt", p).flags["eps"] for p in ("kdzoo", CRD)}
    assert eps == {"kdzoo": 1e-6, CRD: 1e-7}


# --- the newer methods, as their authors train them -----------------------------------------------

SOFT = {"kdzoo": (0.9, 0.1), CRD: (0.9, 0.1)}
# mode: {protocol: (weight, that of the cross-entropy)}, what is trained in addition to the student,
# further traits
NEWER = dict(
    lskd=({"kdzoo": (9.0, 0.1), CRD: (9.0, 0.1)}, ()),
    dist=({"kdzoo": (2.0, 1.0), CRD: (2.0, 1.0), IMAGENET: (2.0, 1.0)}, ()),
    nkd=({"kdzoo": (1.0, 1.0), CRD: (1.0, 1.0), IMAGENET: (1.0, 1.0)}, ()),
    ttm=({CRD: (45.0, 1.0)}, ()),
    wttm=({CRD: (4.0, 1.0)}, ()),
    rld=({"kdzoo": (1.0, 1.0), CRD: (1.0, 1.0), IMAGENET: (1.0, 1.0)}, ()),
    ctkd=(SOFT | {IMAGENET: (1.0, 1.0)}, ("theta",), "epoch"),
    wsld=({"kdzoo": (2.25, 1.0), CRD: (2.25, 1.0), IMAGENET: (2.5, 1.0)}, ()),
    srrl=({"kdzoo": (1.0, 1.0), CRD: (1.0, 1.0)}, ("projector",)),
    simkd=({"kdzoo": (1.0, 0.0), CRD: (1.0, 0.0)}, ("projector",)),
    itrd=({"kdzoo": (1.0, 1.0), CRD: (1.0, 1.0)}, ("embed",)),
    pefd=({"kdzoo": (25.0, 1.0), CRD: (25.0, 1.0)}, ("projectors",)),
    vkd=({"kdzoo": (25.0, 1.0), CRD: (25.0, 1.0)}, ("weight",), "no decay"),
    ickd=({"kdzoo": (2.5, 1.0), CRD: (2.5, 1.0)}, ("embed",)),
    catkd=({"kdzoo": (1.5, 1.0)}, ()),
    mlkd=({CRD: (0.9, 0.1), IMAGENET: (0.5, 0.5)}, (), "two views"),
    wkd_l=({"kdzoo": (1.0, 1.0), CRD: (1.0, 1.0), IMAGENET: (1.0, 1.0)}, (), "epoch"),
    wkd_f=({"kdzoo": (0.08, 1.0), CRD: (0.08, 1.0), IMAGENET: (0.02, 1.0)}, ("conv", "bn")),
    sdd=({"kdzoo": (0.9, 0.1), CRD: (0.9, 0.1)}, ()),
    mgd=({"kdzoo": (0.0012, 1.0), IMAGENET: (0.00007, 1.0)}, ("generation",)),
    crld=({"kdzoo": (1.0, 1.0), CRD: (1.0, 1.0)}, (), "two views"),
    semckd=({CRD: (400.0, 1.0)}, ("queries", "keys", "projections")),
    ofa=({"kdzoo": (1.0, 1.0), CRD: (1.0, 1.0)}, ("heads",)),
)


def test_the_newer_methods_are_all_there():
    """All that a published table has settings for."""
    newer = list(METHODS)[list(METHODS).index("lskd") :]
    published_ones = {mode for by_mode in published.SETTINGS.values() for mode in by_mode}
    assert set(newer) & published_ones <= set(NEWER) <= set(newer)


@pytest.mark.parametrize("mode", NEWER)
def test_a_newer_method_is_trained_as_its_authors_do(mode):
    by_protocol, own_modules, *traits = NEWER[mode]
    for protocol, expected in by_protocol.items():
        row = settings_of(mode, protocol)
        assert (row.lambda_kd, row.lambda_ce) == expected, protocol
        assert len(row.phases) == 1 and row.phases[0].weight is None
    distiller = toys.distiller(mode)
    assert distiller.two_views == ("two views" in traits)
    names = distiller.added[0].settings.inputs.feed.__code__.co_names
    assert ("epoch" in names) == ("epoch" in traits)
    phase = distiller.phases[0]
    assert phase.trainable == ("student", "kd") and phase.ce == (mode != "simkd")
    groups = distiller.param_groups(phase)
    held = {id(p) for group in groups for p in group["params"]}
    own = dict(distiller.added[0].loss.named_parameters())
    assert {name.split(".")[0] for name in own} == set(own_modules)
    assert all(id(p) in held for p in own.values())
    assert all(id(p) in held for p in distiller.student.net.parameters())
    assert not any(id(p) in held for p in distiller.teacher.net.parameters())
    without = [group for group in groups if group.get("weight_decay") == 0]
    assert bool(without) == ("no decay" in traits)
    assert (
        distiller.student.net.training
        and distiller.added.training
        and not distiller.teacher.net.training
    )

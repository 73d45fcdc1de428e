"""Distilling detectors: loss terms, published settings, and runs from the command line."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import coco_like
import pytest
import torch
import torchvision
from messages import ends, refused
from test_interruption import assert_same, result

import network
import utils
from detection import train_det
from engine.checkpoint import read_checkpoint
from engine.run import read_metrics
from kd_losses.dkd import DKD
from kd_losses.reviewkd import hcl

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CPU = utils.Precision()
VIEW = train_det.View(min_size=(64, 96), max_size=128, anchor=8, rois=16)
PAIRS = list(train_det.REVIEWKD_WEIGHT)


def detector(name, seed=0, view=VIEW, **wishes):
    torch.manual_seed(seed)
    return train_det.build(name, 4, view, **wishes)


def distiller_of(mode, s="fasterrcnn_mobilenet_v2", t="fasterrcnn_resnet18", weights=(1.0, 1.0)):
    parts = {name: train_det.PARTS[name] for name in train_det.MODES[mode]}
    made = train_det.Distiller(detector(s), detector(t, 1), parts, weights[: len(parts)])
    made.set_trainable()
    return made


def batch(empty=(False, True)):
    """Two images; by default the second has no box."""
    torch.manual_seed(2)
    imgs = [torch.rand(3, 70, 90), torch.rand(3, 96, 64)]
    boxes = torch.tensor([[10.0, 10, 40, 50], [30, 20, 80, 60]])
    targets = [
        dict(
            boxes=torch.zeros(0, 4) if none else boxes,
            labels=torch.zeros(0, dtype=torch.int64) if none else torch.tensor([1, 3]),
            masks=torch.ones(0 if none else 2, *img.shape[1:], dtype=torch.uint8),
        )
        for img, none in zip(imgs, empty)
    ]
    return imgs, targets


def caught(made, imgs, targets, seed=3):
    """(losses of the student, its intermediate results, those of the teacher)."""
    torch.manual_seed(seed)
    terms = made.student(imgs, targets)
    s, made.caught = made.caught, train_det.Caught()
    return terms, s, made.teach(s)


# --- loss terms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({name for pair in PAIRS for name in pair}))
def test_levels_of_the_published_detectors(name):
    """Five levels of 256 channels, at strides 4 to 64 (RetinaNet: 8 to 128), so all pairs agree."""
    net = detector(name).eval()
    with torch.no_grad():
        levels = net.backbone(torch.rand(1, 3, 128, 160)).values()
    strides = [8, 16, 32, 64, 128] if name.startswith("retinanet") else [4, 8, 16, 32, 64]
    sizes = [(1, 256, -(-128 // x), -(-160 // x)) for x in strides]
    assert [tuple(fm.shape) for fm in levels] == sizes


def test_parameters_are_torchvisions():
    view = train_det.View()
    counts = dict(resnet18=28_730_006, resnet50=41_755_286, mobilenet_v2=19_218_326)
    for name, count in counts.items():
        net = train_det.build(f"fasterrcnn_{name}", 91, view, norm="frozen")
        assert network.count_parameters(net) == count
    own = train_det.build("retinanet_resnet50", 91, view, norm="frozen").state_dict()
    theirs = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None
    )
    shapes = {key: x.shape for key, x in theirs.state_dict().items()}
    counters = {key for key in shapes if key.endswith("num_batches_tracked")}
    assert {key: x.shape for key, x in own.items()} | {k: () for k in counters} == shapes


def test_both_heads_see_the_same_regions():
    made = distiller_of("dkd")
    seen = {}
    for side, net in (("s", made.student), ("t", made.teacher)):
        net.roi_heads.box_roi_pool.register_forward_pre_hook(
            lambda m, args, side=side: seen.update({side: args[1:]})
        )
    _, s, t = caught(made, *batch())
    boxes, sizes = zip(seen["s"], seen["t"])
    assert sizes[0] == sizes[1] and all(torch.equal(a, b) for a, b in zip(*boxes))
    assert [len(x) for x in s.boxes] == [len(x) for x in boxes[0]]
    assert s.logits.shape == t.logits.shape == (sum(map(len, s.boxes)), 4)
    assert s.labels.shape == s.logits.shape[:1]


def test_the_students_head_runs_once_and_the_images_are_resized_once():
    made, calls = distiller_of("reviewdkd"), []
    for name in ("roi_heads.box_head", "roi_heads.box_predictor", "backbone", "transform"):
        for side, net in (("s", made.student), ("t", made.teacher)):
            net.get_submodule(name).register_forward_hook(
                lambda *_, name=name, side=side: calls.append((side, name))
            )
    made.losses(*batch())
    assert sorted(calls) == sorted(
        [(side, x) for side in "st" for x in ("roi_heads.box_head", "roi_heads.box_predictor")]
        + [("s", "backbone"), ("t", "backbone"), ("s", "transform")]
    )


def test_terms_are_the_losses_of_what_was_caught():
    made = distiller_of("reviewdkd")
    made.kd.eval(), made.student.backbone.eval()  # batch norms would be updated twice
    imgs, targets = batch()
    own, s, t = caught(made, imgs, targets)
    torch.manual_seed(3)
    terms = made.losses(imgs, targets)
    assert terms.keys() == {*own, "reviewkd", "dkd"}
    for name, value in own.items():
        torch.testing.assert_close(terms[name], value)
    expected = DKD(alpha=1.0, beta=0.25, T=1.0)(s.logits, t.logits, s.labels)
    torch.testing.assert_close(terms["dkd"], expected)
    fused, total = None, 0.0
    for abf, fm_s, fm_t in zip(made.kd["reviewkd"].abfs, s.levels[::-1], t.levels[::-1]):
        out, fused = abf(fm_s, fused, fm_t.shape[2:])
        total = total + hcl([out], [fm_t])
    torch.testing.assert_close(terms["reviewkd"], total)
    assert made.caught == train_det.Caught()  # no tensor is kept


def test_background_is_a_class():
    """Class 0 is the class of every region of an image without boxes."""
    made = distiller_of("dkd")
    _, s, t = caught(made, *batch(empty=(True, True)))
    assert len(s.labels) > 0 and not s.labels.any()
    value = made.parts["dkd"].compare(made.kd["dkd"], s, t)
    torch.testing.assert_close(value, DKD(1.0, 0.25, 1.0)(s.logits, t.logits, 0 * s.labels))
    _, s, _ = caught(made, *batch())
    first = len(s.boxes[0])
    assert {1, 3} <= set(s.labels[:first].tolist()) and not s.labels[first:].any()


@pytest.mark.parametrize(
    "mode, t, s",
    [
        ("reviewdkd", "fasterrcnn_resnet18", "fasterrcnn_mobilenet_v2"),
        ("reviewdkd", "maskrcnn_resnet18", "maskrcnn_resnet18"),
        ("reviewkd", "retinanet_resnet18", "retinanet_resnet18"),
        ("none", None, "fasterrcnn_resnet18"),
    ],
)
@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_step_moves_the_student_and_not_the_teacher(mode, t, s, bf16):
    made = distiller_of(mode, s, t or s)
    before = [copy.deepcopy(x.state_dict()) for x in (made.teacher, made.student, made.kd)]
    params = made.set_trainable()
    optimizer = torch.optim.SGD(params, lr=1e-3)
    terms = train_det.train_step(
        made, optimizer, *batch(), utils.Precision("cpu", torch.bfloat16 if bf16 else None)
    )
    assert all(x.isfinite() and x.dtype == torch.float32 for x in terms.values())
    assert {"reviewkd", "dkd"} & set(terms) == set(train_det.MODES[mode])
    for p in params:
        assert p.grad is not None and p.grad.isfinite().all()
    torch.testing.assert_close(made.teacher.state_dict(), before[0], rtol=0, atol=0)
    if mode == "none":
        return
    assert not any(m.training for m in made.teacher.modules())
    assert all(p.grad is None for p in made.teacher.parameters())
    for part in ("backbone.body", "backbone.fpn"):
        moved = [
            not torch.equal(x, before[1][key])
            for key, x in made.student.state_dict().items()
            if key.startswith(part) and key.endswith("weight")
        ]
        assert moved and any(moved)
    if "reviewkd" in made.kd:
        for key, x in made.kd.named_parameters():
            assert not torch.equal(x, before[2][key]), key


def test_the_method_alone_reaches_backbone_and_pyramid():
    for name in ("reviewkd", "dkd"):
        made = distiller_of(name)
        value = made.losses(*batch())[name]
        grads = torch.autograd.grad(value, made.set_trainable(), allow_unused=True)
        params = {id(p): g for p, g in zip(made.set_trainable(), grads)}
        for module in (made.student.backbone.body, made.student.backbone.fpn, made.kd):
            found = [params[id(p)] for p in module.parameters()]
            assert all(g is not None and g.abs().max() > 0 for g in found[:1])


def test_each_network_has_its_own_normalisation():
    made = distiller_of("reviewkd")
    own, other = made.student.transform, copy.deepcopy(made.student.transform)
    other.image_mean, other.image_std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    own.eval(), other.eval()  # the same sizes
    imgs = [torch.rand(3, 50, 90), torch.rand(3, 90, 50)]
    images, expected = own(imgs)[0], other(imgs)[0].tensors
    torch.testing.assert_close(train_det.renormalised(images, own, other), expected)
    assert (expected == 0).any()  # the padding
    assert train_det.renormalised(images, own, own) is images.tensors


# --- published settings ---------------------------------------------------------------------------


def plan(*flags):
    args, parts = train_det.parse([*flags])
    s = train_det.find(args.s_name, None, "s", None)
    t = train_det.find(args.t_name, None, "t", None) if parts else None
    return train_det.resolve(args, s, t), parts


def test_schedule():
    recipe, parts = plan("--kd_mode", "none", "--s_name", "fasterrcnn_resnet18")
    assert (recipe.iters, recipe.milestones, recipe.lr) == (180_000, (120_000, 160_000), 0.01)
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay) == (8, 0.9, 1e-4)
    assert (recipe.warmup, recipe.min_size[0], recipe.min_size[-1]) == (1000, 640, 800)
    assert (recipe.max_size, recipe.anchor, recipe.rois, recipe.nesterov) == (1333, 32, 512, 0)
    assert parts == {}
    assert plan("--kd_mode", "none", "--s_name", "retinanet_resnet50")[0].lr == 0.005
    short, _ = plan(
        *("--kd_mode", "none", "--s_name", "fasterrcnn_resnet18"),
        *("--iters", "1800", "--batch_size", "16"),
    )
    assert (short.milestones, short.warmup, short.lr) == ((1200, 1600), 10, 0.02)


def test_weights_of_the_pairs():
    review = train_det.REVIEWKD_WEIGHT
    assert review["fasterrcnn_resnet101", "fasterrcnn_resnet18"] == 1.2
    assert review["maskrcnn_resnet101", "maskrcnn_resnet50"] == 0.8
    assert review["fasterrcnn_resnet50", "fasterrcnn_mobilenet_v2"] == 2.0
    _, parts = plan(
        *("--kd_mode", "reviewdkd", "--t_name", "fasterrcnn_resnet50"),
        *("--s_name", "fasterrcnn_resnet18"),
    )
    assert parts["dkd"].flags == dict(alpha=1.0, beta=0.25, T=1.0)
    assert parts["reviewkd"].flags == dict(mid_channel=256)


def test_frozen_layers_of_pretrained_weights(tmp_path, monkeypatch):
    """Stem and first stage of a ResNet, no layer of MobileNetV2; all batch norms are frozen."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("resnet18", "mobilenet_v2"):
        weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        state = torchvision.models.get_model(name, weights=None).state_dict()
        torch.save(state, folder / weights.url.rpartition("/")[2])
        net = detector(f"fasterrcnn_{name}", weights="backbone", norm="frozen")
        still = {
            k.split(".")[0] for k, p in net.backbone.body.named_parameters() if not p.requires_grad
        }
        assert still == ({"conv1", "layer1"} if name == "resnet18" else set())
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
        first = next(iter(net.backbone.body.state_dict().values()))
        assert torch.equal(first, next(iter(state.values())))


def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for weights, name in (("backbone", "resnet18"), ("detector", "fasterrcnn_resnet50_fpn")):
        kind = "fasterrcnn_resnet18" if weights == "backbone" else "fasterrcnn_resnet50"
        with refused(name):
            detector(kind, weights=weights, norm="frozen")
    with refused("fasterrcnn_resnet18"):
        detector("fasterrcnn_resnet18", weights="detector")


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    coco_like.draw(root, train=12, val=4, size=96, seed=1)
    return root


QUICK = [
    "--cuda",
    "0",
    "--amp",
    "off",
    "--workers",
    "0",
    "--min_size",
    "64,96",
    "--max_size",
    "128",
]
QUICK += ["--anchor", "8", "--rois", "16", "--batch_size", "2", "--print_freq", "1"]


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    argv = ["--kd_mode", "none", "--s_name", "fasterrcnn_resnet18", "--img_root", str(folder)]
    argv += [*QUICK, "--iters", "2", "--eval_every", "1", "--note", "t"]
    return train_det.main([*argv, "--save_root", str(tmp_path_factory.mktemp("t"))])["dir"]


def command(teacher, root, note, *more):
    """The command line of a distillation; image sizes come from the teacher."""
    argv = ["--kd_mode", "reviewdkd", "--t_model", f"{teacher}/checkpoint.pth.tar"]
    argv += ["--s_name", "fasterrcnn_mobilenet_v2", "--cuda", "0", "--amp", "off", "--workers", "0"]
    argv += ["--batch_size", "2", "--iters", "4", "--eval_every", "2", "--save_every", "0"]
    return [*argv, "--save_root", str(root), "--note", note, *more]


@pytest.mark.slow
def test_distils_and_resumes_after_a_kill(teacher, tmp_path, capsys):
    whole = train_det.main(command(teacher, tmp_path, "whole"))
    out = capsys.readouterr().out
    assert "teacher AP" in out and "reviewkd: lambda_kd 1, mid_channel 256" in out
    sizes = "shorter side (64, 96), longer side at most 128, smallest anchor 8, 16 regions"
    assert sizes in out
    rows = read_metrics(whole["dir"])
    assert [row["step"] for row in rows] == [2, 4] and {"reviewkd", "dkd", "AP50"} <= set(rows[0])
    kill = (
        "import os, signal, sys, utils\n"
        "from detection import train_det\n"
        "add, left = utils.Meter.add, [3]\n"
        "def count(*args):\n"
        "    left[0] -= 1\n"
        "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    add(*args)\n"
        "utils.Meter.add = count\n"
        "train_det.main(sys.argv[1:])\n"
    )
    argv = command(teacher, tmp_path, "killed")
    done = subprocess.run([sys.executable, "-c", kill, *argv], cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr
    train_det.main([*argv, "--resume"])
    assert_same(result(tmp_path / "whole"), result(tmp_path / "killed"))
    best = read_checkpoint(tmp_path / "whole" / "model_best.pth.tar")
    assert best["meta"]["network"] == "fasterrcnn_mobilenet_v2" and best["meta"]["anchor"] == 8
    again = ["--kd_mode", "none", "--s_init", f"{whole['dir']}/model_best.pth.tar", "--dry_run"]
    train_det.main([*again, "--save_root", str(tmp_path)])
    assert "fasterrcnn_mobilenet_v2, coco" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, names",
    [
        ("--kd_mode dkd --s_name fasterrcnn_resnet18", "--t_name --t_model"),
        (
            "--kd_mode dkd --t_name fasterrcnn_resnet18 --s_name fasterrcnn_resnet18",
            "--t_model --t_pretrained",
        ),
        ("--kd_mode kd --s_name fasterrcnn_resnet18", "--kd_mode kd dkd"),
        ("--kd_mode none --s_name fasterrcnn_resnet19", "fasterrcnn_resnet19 fasterrcnn_resnet18"),
        ("--kd_mode none", "--s_name --s_init"),
        ("--kd_mode none --s_name fasterrcnn_resnet18 --beta 1", "--beta dkd"),
        ("--kd_mode none --s_name fasterrcnn_resnet18 --t_pretrained", "--kd_mode none"),
        ("--kd_mode dkd --t_model {t} --s_name retinanet_resnet18", "dkd RetinaNet"),
        ("--kd_mode reviewkd --t_model {t} --s_name retinanet_resnet18", "128"),
        (
            "--kd_mode dkd --t_model {t} --t_name fasterrcnn_resnet50 --s_name fasterrcnn_resnet18",
            "--t_name fasterrcnn_resnet50 fasterrcnn_resnet18",
        ),
        (
            "--kd_mode dkd --t_model {t} --t_pretrained --s_name fasterrcnn_resnet18",
            "--t_model {t}",
        ),
        ("--kd_mode dkd --t_model {t}x --s_name fasterrcnn_resnet18", "{t}x"),
        (
            "--kd_mode dkd --t_model {t} --s_name fasterrcnn_resnet18 --lambda_kd 1,2",
            "--lambda_kd 1",
        ),
        ("--kd_mode dkd --t_model {t} --s_name fasterrcnn_resnet18 --T 0", "--T 0"),
        ("--kd_mode none --s_name fasterrcnn_resnet18 --img_root {root}/nowhere", "{root}/nowhere"),
        (
            "--kd_mode none --s_name fasterrcnn_resnet18 --min_size 900 --max_size 800",
            "--min_size 900 --max_size 800",
        ),
        ("--kd_mode none --s_init {t} --anchor 16", "--anchor 16 --s_init 8"),
        ("--kd_mode none --s_init {digits}", "resnet8"),
        (
            "--kd_mode none --s_init {spoilt}",
            "{spoilt} backbone.body.conv1.weight",
        ),
        ("--kd_mode none --s_name fasterrcnn_resnet18 --batch_size 500", "--batch_size 500"),
    ],
)
def test_bad_input_is_one_line(flags, names, teacher, folder, tmp_path, capsys):
    digits = tmp_path / "r8.pth"
    net = network.build("resnet8", 10)
    torch.save(dict(net=net.state_dict(), meta=dict(network="resnet8", num_class=10)), digits)
    spoilt = tmp_path / "spoilt.pth"
    places = dict(t=f"{teacher}/checkpoint.pth.tar", root=folder, digits=digits, spoilt=spoilt)
    if "{spoilt}" in flags:
        best = read_checkpoint(f"{teacher}/model_best.pth.tar")
        best["snet"]["backbone.body.conv1.weight"][0] = float("nan")
        torch.save(best, spoilt)
    argv = [part.format(**places) for part in flags.split()]
    argv += [] if "--img_root" in flags else ["--img_root", str(folder)]
    with ends(capsys, *names.format(**places).split()):
        train_det.main([*argv, "--cuda", "0", "--save_root", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "key, value",
    [
        *(("min_size", x) for x in (3, [], [1], [10**400], [True], ["64"], [64, 2**63], {64: 1})),
        *(("max_size", x) for x in (31, 64.0, 10**400, True, [96])),
        *(("anchor", x) for x in (0, "8", 2**63, True)),
        *(("rois", x) for x in (1, 1e9, torch.tensor(16), dict(a=1))),
        *(("num_class", x) for x in (1, True, 2**63, 10**400)),
        *(("network", x) for x in ("simkd:" * 3000, "\0", 5)),
        ("img_root", "a\0b"),
    ],
)
def test_crafted_metadata(key, value, teacher, tmp_path, capsys):
    best = read_checkpoint(f"{teacher}/model_best.pth.tar")
    torch.save(dict(best, meta=best["meta"] | {key: value}), tmp_path / "x.pth")
    argv = ["--kd_mode", "none", "--s_init", str(tmp_path / "x.pth"), "--cuda", "0"]
    with ends(capsys, tmp_path / "x.pth", key) as said:
        train_det.main([*argv, "--save_root", str(tmp_path / "runs")])
    assert len(said[0]) < 400
    assert not (tmp_path / "runs").exists()


def test_without_pycocotools(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    argv = ["--kd_mode", "none", "--s_name", "fasterrcnn_resnet18", "--img_root", str(folder)]
    with ends(capsys, "pip install pycocotools"):
        train_det.main([*argv, *QUICK, "--save_root", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_another_number_of_classes(teacher, tmp_path, capsys):
    coco_like.draw(tmp_path / "x", train=6, val=2, size=96, seed=1)
    for split in ("train2017", "val2017"):
        file = tmp_path / "x" / "annotations" / f"instances_{split}.json"
        found = json.loads(file.read_text())
        found["categories"].append(dict(id=50, name="more"))
        file.write_text(json.dumps(found))
    argv = command(teacher, tmp_path, "r", "--img_root", str(tmp_path / "x"))
    with ends(capsys, f"{teacher}/checkpoint.pth.tar", 51):
        train_det.main(argv)

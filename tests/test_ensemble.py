"""Several teachers: the ensemble's logits, the sum of the losses, and whole runs."""

import copy
import json
import signal

import pytest
import torch
import torch.nn.functional as F
import toys
from conftest import tiers
from messages import ends
from mistakes import META
from test_interruption import assert_same, result, stop_at
from test_together import assert_as_alone, command

import network
import train_kd
import utils
from engine.ensemble import KINDS, Ensemble, ensemble_logits
from kd_losses import METHODS
from kd_losses.sobolev import Sobolev
from tools import eval as evaluation

K = 3
LOGITS = [mode for mode, m in METHODS.items() if m.inputs.reads == ("out",)]
ONE_ONLY = {"dml", "simkd", "wkd_l"}  # methods that can have one teacher only
OF_DIGITS = META | dict(mean=[0.3057] * 3, std=[0.3219] * 3)
EVERY = [mode for mode in METHODS if mode not in ONE_ONLY]


# --- the logits -----------------------------------------------------------------------------------


def naive(kind, logits, target):
    """Image by image, class by class, as the formulas read."""
    out = torch.zeros_like(logits[0])
    for b in range(len(target)):
        p = [z[b].exp() / z[b].exp().sum() for z in logits]
        if kind == "probs":
            out[b] = torch.log(sum(p) / len(p))
        elif kind == "logits":
            out[b] = sum(z[b] for z in logits) / len(logits)
        else:
            ce = [-torch.log(x[target[b]]) for x in p]
            total = sum(torch.exp(x) for x in ce)
            weights = [(1 - torch.exp(x) / total) / (len(logits) - 1) for x in ce]
            assert sum(weights).item() == pytest.approx(1)
            out[b] = sum(w * z[b] for w, z in zip(weights, logits))
    return out


@pytest.fixture
def logits():
    torch.manual_seed(3)
    return [3 * torch.randn(8, 5, dtype=torch.float64) for _ in range(K)], torch.arange(8) % 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind, logits):
    torch.testing.assert_close(ensemble_logits(kind, *logits), naive(kind, *logits))


@pytest.mark.parametrize("kind", KINDS)
def test_precision(kind, logits):
    """float32 at least, also from bfloat16 under autocast; far apart logits stay finite."""
    z, target = logits
    with torch.autocast("cpu", torch.bfloat16):
        found = ensemble_logits(kind, [x.bfloat16() for x in z], target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), naive(kind, *logits), rtol=0.02, atol=0.05)
    far = [1000 * x.float() for x in z]
    assert ensemble_logits(kind, far, target).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_teachers_are_one(kind, logits):
    z, target = logits
    found = ensemble_logits(kind, [z[0]] * K, target)
    torch.testing.assert_close(found.softmax(1), z[0].softmax(1))


# --- the losses -----------------------------------------------------------------------------------


def several(mode, kind="probs", nets=None, argv=()):
    """A distiller of float64 with several teachers, and the teachers."""
    nets = nets or [toys.Toy() for _ in range(K)]
    return in_float64(toys.distiller(mode, teacher=Ensemble(nets, kind), argv=argv)), nets


def with_one(mode, like, teacher):
    """A distiller of float64 with one teacher, and the student of another distiller."""
    student = toys.Toy()
    student.load_state_dict(like.student.net.state_dict())
    return in_float64(toys.distiller(mode, student, copy.deepcopy(teacher).float()))


def in_float64(found):
    for module in (*found.networks, found.added):
        module.double().eval()
    return found


def losses(found, batch):
    """{criterion: its loss} on a batch."""
    if found.image_grad:
        batch.img.requires_grad_()
    s, t = batch.features(found.student), batch.features(found.teacher)
    return {
        name: criterion(s, t, batch, found.phases[0].inputs)
        for name, criterion in found.criteria.items()
    }


@pytest.mark.parametrize("kind, T", [("probs", 1.0), ("logits", 4.0), ("confidence", 4.0)])
def test_the_gradient_is_the_hand_written_one(kind, T, logits):
    """Of the soft targets: T * (softmax(s / T) - softmax(z / T)) / B in the student's logits; for
    the mean of the probabilities at T = 1 the difference from that mean."""
    found, nets = several("st", kind, argv=["--T", str(T)])
    batch = toys.batch()
    out = {}
    found.student.net.register_forward_hook(lambda net, args, x: out.update(s=x) or x.retain_grad())
    losses(found, batch)["kd"].backward()
    z = [net(batch.img).detach() for net in nets]
    if kind == "probs":
        p = sum(x.softmax(1) for x in z) / K
    else:
        p = (naive(kind, z, batch.target) / T).softmax(1)
    expected = T * ((out["s"] / T).softmax(1) - p) / len(batch.img)
    torch.testing.assert_close(out["s"].grad, expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", tiers([x for x in EVERY if x not in LOGITS], "fitnet", "catkd"))
def test_a_feature_loss_is_the_sum(mode):
    """Of the losses with each teacher alone, whose state a single distiller can load."""
    found, nets = several(mode)
    singles = [with_one(mode, found, net) for net in nets]
    batch = toys.batch()
    torch.manual_seed(5)
    (total,) = losses(found, batch).values()
    assert len(found.added) == K
    alone = []
    torch.manual_seed(5)
    for one, part in zip(singles, found.added):
        one.added[0].load_state_dict(part.state_dict())
        alone += losses(one, batch).values()
    torch.testing.assert_close(total, sum(alone), rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", tiers(LOGITS, "st", "dkd", "mlkd"))
def test_a_logit_method_learns_from_the_ensemble(mode):
    """It is what one teacher would give whose call returns the ensemble's logits."""
    if mode in ONE_ONLY or mode == "bss":
        pytest.skip("has one teacher only, or attacks the teachers at random")
    found, nets = several(mode, "logits")
    assert len(found.added) == 1
    batch = toys.batch(strong=METHODS[mode].two_views)
    torch.manual_seed(5)
    (value,) = losses(found, batch).values()
    nets = torch.nn.ModuleList(nets)

    class Mean(toys.Toy):
        def forward(self, img):
            return sum(net(img) for net in self.nets) / K

    mean = Mean()
    mean.nets = nets
    one = with_one(mode, found, mean)
    one.added.load_state_dict(found.added.state_dict())
    torch.manual_seed(5)
    torch.testing.assert_close(value, *losses(one, batch).values(), rtol=1e-9, atol=0)


def test_a_gradient_through_the_ensemble():
    found, nets = several("sobolev", "probs")
    batch = toys.batch()
    (value,) = losses(found, batch).values()
    img = batch.img.detach().requires_grad_()
    z = torch.log(sum(net(img).softmax(1) for net in nets) / K)
    expected = Sobolev()(found.student.net(img), z, img, batch.target)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)


def test_teachers_of_different_depth_and_width():
    """Stages are counted from the deepest, for each teacher of its own."""
    short, wide = toys.Toy(), toys.Toy((4, 4, 8, 16))
    short.taps = short.taps | dict(stages=["mark2", "mark3"])
    nets = [toys.Toy(), short, wide]
    adapted = toys.distiller("fitnet", teacher=Ensemble(nets, "probs")).added
    assert [bool(list(part.parameters())) for part in adapted] == [False, False, True]
    found, _ = several("at", nets=nets)
    assert [len(part.stage_ids) for part in found.added] == [3, 2, 3]
    batch, alone = toys.batch(), []
    for net in nets:
        alone += losses(with_one("at", found, net), batch).values()
    torch.testing.assert_close(losses(found, batch)["kd"], sum(alone), rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", tiers([*EVERY, "st+at"], "ft", "st+at"))
def test_a_step_trains_every_part_and_no_teacher(mode):
    """In every phase; what the phase trains of the methods has gradients for each teacher."""
    nets = [toys.Toy((4, 4, 8, 12)) for _ in range(K)]
    found = toys.distiller(mode, teacher=Ensemble(nets, "confidence" if mode == "st" else "probs"))
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
    precision = utils.precision(torch.device("cpu"), "off")
    for phase in found.phases:
        groups = found.param_groups(phase)
        optimizer = torch.optim.SGD(groups, lr=0.01)
        batch = toys.batch(dtype=torch.float32, strong=found.two_views)
        step = train_kd.train_step(
            found, phase, optimizer, batch, toys.weights(found, phase=phase), precision
        )
        assert all(x.isfinite().all() for x in step.values())
        if phase.kd and mode != "bss":
            learning = [[p for p in part.parameters() if p.requires_grad] for part in found.added]
            of_each = [n for n in map(len, learning) if n]
            of_one = 1 if mode in LOGITS else K
            assert len(of_each) in (0, of_one) and len(set(of_each)) < 2
    for net, old in zip(nets, before):
        assert all(torch.equal(x, old[key]) for key, x in net.state_dict().items())
        assert not any(p.requires_grad for p in net.parameters())


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of three teachers, by --t_model's syntax."""
    torch.manual_seed(0)
    root, paths = tmp_path_factory.mktemp("teachers"), []
    for i, name in enumerate(("resnet14", "resnet14", "vgg8")):
        paths.append(str(root / f"{i}.pth"))
        net = network.build(name, 10).state_dict()
        torch.save(dict(net=net, meta=OF_DIGITS | dict(network=name)), paths[-1])
    return ",".join(paths)


def test_the_run_says_who_teaches(files, tmp_path):
    argv = command("st+fitnet", files, tmp_path, "--ensemble", "confidence")
    train_kd.main(argv)
    log = (tmp_path / "r" / "log.txt").read_text()
    for line in (
        *("st: learns from the ensemble (confidence) of 3 teachers", "fitnet, teacher 3: adapter"),
        *("teacher 1 (resnet14) test_top1 ", "teacher 2 (resnet14) test_top1 "),
        *("teacher 3 (vgg8) test_top1 ", "ensemble of the teachers (logits, since confidence"),
    ):
        assert log.count(line) >= 1, line
    record = json.loads((tmp_path / "r" / "args.json").read_text())
    teacher, paths = record["teacher"], files.split(",")
    assert (teacher["network"], teacher["ensemble"]) == ("resnet14,resnet14,vgg8", "confidence")
    assert [x["path"] for x in teacher["members"]] == paths
    assert [x["sha256"] for x in teacher["members"]] == record["sources"]["teacher"]
    assert len(set(record["sources"]["teacher"])) == 3
    assert {"st", "fitnet, teacher 1", "fitnet, teacher 3"} < set(record["methods"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["st+fitnet", pytest.param("vid", marks=pytest.mark.slow)])
def test_resume_is_exact(mode, files, tmp_path, monkeypatch):
    argv = command(mode, files, tmp_path / "stopped", *["--accumulate", "2"] * (mode != "vid"))
    with monkeypatch.context() as patch:
        stop_at(patch, 13, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_kd.main(argv)
    train_kd.main([*argv, "--resume"])
    whole = command(mode, files, tmp_path / "whole", *argv[argv.index("r") + 1 :])
    train_kd.main(whole)
    assert_same(result(tmp_path / "stopped" / "r"), result(tmp_path / "whole" / "r"))


@pytest.mark.slow
def test_another_teacher_is_refused(files, tmp_path, monkeypatch, capsys):
    own = [tmp_path / f"{i}.pth" for i in range(3)]
    for path, mine in zip(files.split(","), own):
        mine.write_bytes(open(path, "rb").read())
    argv = command("st", ",".join(map(str, own)), tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, 7, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_kd.main(argv)
    own[1].write_bytes(own[0].read_bytes())
    with ends(capsys, "--t_model", "number", "2"):
        train_kd.main([*argv, "--resume"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "students, more",
    [
        ("none,st,fitnet,st+at", ["--accumulate", "2"]),
        pytest.param("st,mlkd,crd,ft,sobolev,ofd", [], marks=pytest.mark.slow),
        pytest.param("dkd,at", ["--ensemble", "confidence"], marks=pytest.mark.slow),
        pytest.param("st,dkd", ["--ensemble", "logits", "--logit_stand"], marks=pytest.mark.slow),
    ],
)
def test_several_students_are_as_alone(students, more, files, tmp_path, monkeypatch):
    """One pass of each teacher for all of them."""
    argv = command(students, files, tmp_path / "group", *more, "--epochs", "1")
    passes, call = [], network.Tapped.__call__

    def counted(self, img):
        if not any(p.requires_grad for p in self.net.parameters()) and len(img) > 2:
            passes.append(id(self.net))
        return call(self, img)

    with monkeypatch.context() as patch:
        patch.setattr(network.Tapped, "__call__", counted)
        train_kd.main(argv)
    if "sobolev" not in students and "mlkd" not in students and "ft" not in students:
        parts = 2 if "--accumulate" in more else 1
        assert len(set(passes)) == 3 and len(passes) == 3 * 11 * parts
    assert_as_alone(students, argv, tmp_path / "group", tmp_path)


def test_the_ensemble_is_a_flag_of_those_that_use_it(files, tmp_path):
    argv = command("at,st", files, tmp_path / "x", "--ensemble", "logits")
    lines = train_kd.kd_cli.command_lines(argv)
    assert "--ensemble" in lines["st"] and "--ensemble" not in lines["at"]
    argv = command("dkd,st", files, tmp_path / "x", "--st.ensemble", "logits")
    lines = train_kd.kd_cli.command_lines(argv)
    assert "--ensemble" in lines["st"] and "--ensemble" not in lines["dkd"]


def test_names_and_taps_of_each(files, tmp_path, capsys):
    names = ["--t_name", "resnet14,resnet14,vgg8"]
    taps = ["--t_taps", "layer1,layer2+layer2,layer3+block1,block2"]
    argv = command("fitnet", files, tmp_path, *names, *taps, "--dry_run")
    train_kd.main(argv)
    out = capsys.readouterr().out
    assert "teacher 1: adapter, stages0 64x3x3 -> 32x6x6" in out
    assert "teacher 3: adapter, stages0 64x3x3 -> 256x3x3" in out


@pytest.mark.slow
def test_classes_in_another_order(files, tmp_path):
    """Of one of the teachers: the run is the unpermuted one, byte for byte but for the note."""
    first, second, third = files.split(",")
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    saved = torch.load(second, weights_only=True)
    for key in ("fc.weight", "fc.bias"):
        saved["net"][key] = saved["net"][key][order]
    saved["meta"]["classes"] = [str(i) for i in order]
    torch.save(saved, tmp_path / "permuted.pth")
    found = []
    for i, path in enumerate((second, tmp_path / "permuted.pth")):
        argv = command("st", f"{first},{path},{third}", tmp_path / str(i), "--epochs", "1")
        train_kd.main(argv)
        found.append((tmp_path / str(i) / "r" / "metrics.csv").read_bytes())
    assert found[0] == found[1]


def test_one_teacher_has_nothing_of_it(files, tmp_path):
    """Not the objects, and not the keys of the checkpoint."""
    found = toys.distiller("fitnet", teacher=toys.Toy((4, 4, 8, 16)))
    assert isinstance(found.teacher, network.Tapped)
    assert list(found.criteria.values()) == list(found.added)
    assert {key.split(".")[:3][0] for key in found.added.state_dict()} == {"0"}
    train_kd.main(command("st", files.split(",")[0], tmp_path, "--epochs", "1"))
    record = json.loads((tmp_path / "r" / "args.json").read_text())
    assert set(record["teacher"]) == {"path", "sha256", "network", "pretrained", "outputs"}
    assert isinstance(record["sources"]["teacher"], str)


# --- tools/eval.py --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["probs", "logits"])
def test_eval(kind, files, tmp_path, monkeypatch):
    """The accuracy of the ensemble and of each member, by hand."""
    monkeypatch.setattr(evaluation, "SECONDS", 0)
    flags = ["--ensemble", kind, "--cuda", "0", "--amp", "off"]
    found = evaluation.main([*files.split(","), *flags])
    nets, (images,) = [], [evaluation.stream.load("digits", img_size=12).test]
    for path, name in zip(files.split(","), ("resnet14", "resnet14", "vgg8")):
        nets.append(network.build(name, 10).eval())
        nets[-1].load_state_dict(torch.load(path, weights_only=True)["net"])
    batches = list(evaluation.stream.test_batches(_normalised(images), 100))
    labels = torch.cat([target for _, target, _ in batches])
    with torch.no_grad():
        z = [torch.cat([net(img) for img, *_ in batches]) for net in nets]
    out = naive(kind, [x.double() for x in z], labels)
    assert found["top1"] == pytest.approx(utils.top1(out, labels).item(), abs=0.3)
    assert found["loss"] == pytest.approx(F.cross_entropy(out, labels).item(), rel=1e-4)
    for top1, x in zip(found["members_top1"], z):
        assert top1 == pytest.approx(utils.top1(x, labels).item(), abs=0.3)
    assert found["network"] == "resnet14,resnet14,vgg8"
    assert found["parameters"] == sum(p.numel() for net in nets for p in net.parameters())


def _normalised(images):
    images.mean, images.std = tuple(OF_DIGITS["mean"]), tuple(OF_DIGITS["std"])
    return images

import ast
import json
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import toys
from conftest import tiers
from messages import ends, names

import network
import train_base
import train_kd
import utils
from engine import schedule
from engine import cli, published
from engine.checkpoint import Weights, read_checkpoint, sha256
from engine.run import Run, read_metrics
from kd_losses import METHODS, Phase

ROOT = Path(__file__).parent.parent
DATA = ["--data_name", "digits", "--img_size", "12", "--cuda", "0"]
FEW = ["--epochs", "1", "--batch_size", "256"]


def weights(path, key="snet"):
    checkpoint = read_checkpoint(path)
    return checkpoint[key] if key in checkpoint else checkpoint["net"]


def same(one, two):
    return all(torch.equal(one[key], two[key]) for key in one)


# --- every mode trains ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", tiers(METHODS, "at", "crd"))
def test_one_epoch(mode, base, distil, monkeypatch):
    """Finite, the student changed, the teacher not (unless it learns), a gradient everywhere."""
    step, seen = train_kd.train_step, {}

    def watched(distiller, phase, *args):
        terms = step(distiller, phase, *args)
        modules = (distiller.student.net, distiller.teacher.net, distiller.added)
        learning = [p for m in modules for p in m.parameters() if p.requires_grad]
        idle = (
            METHODS[mode].fixed_batch and "kd" in terms and terms["kd"] == 0
        )  # a last, smaller batch
        assert learning and all(idle or p.grad is not None for p in learning)
        assert all(p.grad.isfinite().all() for p in learning if p.grad is not None)
        for p in learning:
            if p.grad is None:
                continue
            seen[id(p)] = seen.get(id(p), False) or bool((p.grad != 0).any())
        return terms

    monkeypatch.setattr(train_kd, "train_step", watched)
    folder = Path(distil(mode, *FEW)["dir"])
    assert seen and all(seen.values()), "a learnable parameter never had a gradient"

    before = weights(base / "resnet8" / "initial_r8.pth.tar")
    after = weights(folder / "checkpoint.pth.tar")
    if METHODS[
        mode
    ].deploys_projector:  # the student lies in another network, without its classifier
        after = {key.removeprefix("net."): x for key, x in after.items()}
        before = {key: x for key, x in before.items() if key in after}
    assert before and not same(before, after)
    trained = METHODS[mode].teacher == "trained"
    saved = read_checkpoint(folder / "checkpoint.pth.tar")
    assert ("net1" in saved) == trained
    if trained:
        assert not same(weights(base / "resnet14" / "model_best.pth.tar"), saved["net1"])
        assert {"prec1@1", "prec2@5"} <= set(saved)

    rows = read_metrics(folder)
    assert [row["phase"] for row in rows] == [phase.name for phase in METHODS[mode].phases]
    assert all(0 < row["kd"] < 1e6 for row, p in zip(rows, METHODS[mode].phases) if p.kd)
    assert ("peer_test_top1" in rows[-1]) == trained


@pytest.mark.parametrize("mode", METHODS)
def test_the_frozen_teacher_is_bit_for_bit_the_same(mode):
    distiller = toys.distiller(mode)
    before = {k: v.clone() for k, v in distiller.teacher.net.state_dict().items()}
    for phase in METHODS[mode].phases:
        args = cli.resolve(toys.parse(["--kd_mode", mode, *DATA])[0], "x", {})
        optimizer = utils.sgd(distiller.set_trainable(phase), args)
        for _ in range(2):
            batch = toys.batch(dtype=torch.float32, strong=distiller.two_views)
            train_kd.train_step(
                *(distiller, phase, optimizer, batch),
                *(toys.weights(distiller, 1.0, phase), utils.Precision()),
            )
    assert same(before, distiller.teacher.net.state_dict()) == (METHODS[mode].teacher != "trained")


@pytest.mark.slow
def test_the_command_of_the_readme_in_a_process_of_its_own(base, tmp_path):
    """The design's command as it stands: the checkpoints know network, dataset and size."""
    command = [sys.executable, ROOT / "train_kd.py", "--kd_mode=at", "--cuda", "0", *FEW]
    command += [f"--t_model={base / 'resnet14' / 'model_best.pth.tar'}"]
    command += [f"--s_init={base / 'resnet8' / 'initial_r8.pth.tar'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "at-digits-resnet14-resnet8"
    assert len(read_metrics(folder)) == 1
    args = json.loads((folder / "args.json").read_text())
    assert args["methods"]["at"] == dict(
        lambda_kd=1000.0, lambda_ce=1.0, stages=[-3, -2, -1], reduce="mean", p=2.0, absolute=True
    )
    assert args["teacher"]["sha256"] == sha256(base / "resnet14" / "model_best.pth.tar")


SLOWLY = [pytest.param(mode, marks=pytest.mark.soak) for mode in METHODS]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["at", "crd", *SLOWLY])
def test_the_same_seed_gives_the_same_bytes(distil, mode):
    one, two = (Path(distil(mode, *FEW, note=note)["dir"]) for note in "ab")
    other = Path(distil(mode, *FEW, "--seed", "3", note="c")["dir"])
    metrics = [(folder / "metrics.csv").read_bytes() for folder in (one, two, other)]
    assert metrics[0] == metrics[1] != metrics[2]


@pytest.mark.slow
@pytest.mark.parametrize("rows", tiers([1, 2], 1))
@pytest.mark.parametrize("mode", tiers(["crd", "fsp", "dml", "vid"], "crd") + SLOWLY)
def test_resumed_is_the_same_run(distil, monkeypatch, mode, rows):
    """Stopped in any phase, or between two, and gone on with: the same bytes, the same weights."""
    flags = ["--epochs", "3", "--batch_size", "512"]
    whole = Path(distil(mode, *flags, note="whole")["dir"])
    saved = Run.epoch

    def stop(self, *args, **kwargs):
        saved(self, *args, **kwargs)
        if len(self.history) == rows:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "epoch", stop)
    with pytest.raises(SystemExit):
        distil(mode, *flags, note="parts")
    monkeypatch.setattr(Run, "epoch", saved)
    parts = Path(distil(mode, *flags, "--resume", note="parts")["dir"])
    assert (whole / "metrics.csv").read_bytes() == (parts / "metrics.csv").read_bytes()
    one, two = (read_checkpoint(p / "checkpoint.pth.tar") for p in (whole, parts))
    for key in {"snet", "net1", "kd", "optimizer", "rng"} & set(one):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0, equal_nan=True)


# --- every mode learns ----------------------------------------------------------------------------


def learns_more_with_a_wider_teacher(mode):
    """Whether adapters or layers of the method's own come into play."""
    return "channels" in METHODS[mode].match or mode in ("ft", "vid", "ofd", "crd", "reviewkd")


PAIRS = [("resnet20", mode) for mode in METHODS] + [
    pytest.param(
        "resnet8x4",
        mode,
        marks=() if learns_more_with_a_wider_teacher(mode) else pytest.mark.soak,
    )
    for mode in METHODS
]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Teachers that know something, of the student's width and wider, by name; each trained
    once."""

    @lru_cache
    def taught(name):
        folder = tmp_path_factory.mktemp(name)
        argv = ["--net_name", name, "--epochs", "3", "--batch_size", "32", "--lr", "0.05"]
        train_base.main([*DATA, *argv, "--save_root", str(folder), "--note", "t"])
        return folder / "t" / "checkpoint.pth.tar"

    return taught


@pytest.mark.slow
@pytest.mark.parametrize("teacher, mode", PAIRS)
def test_the_term_falls(mode, teacher, teachers, tmp_path, monkeypatch):
    """The unweighted term's mean over the last epoch of its phase is below that of the phase's
    first ten steps. What two learners have between them, or an attack finds, need not fall, nor the
    way from a fresh student's even probabilities to a teacher's nearly even ones: not zero there.
    """
    taught, step, seen = teachers(teacher), train_kd.train_step, {}

    def watched(distiller, phase, *args):
        terms = step(distiller, phase, *args)
        if "kd" in terms and len(args[1].target) >= 64:  # some leave out a last, smaller batch
            seen.setdefault(phase.name, []).append(terms["kd"].item())
        return terms

    monkeypatch.setattr(train_kd, "train_step", watched)
    argv = ["--kd_mode", mode, "--t_model", str(taught), "--s_name", "resnet8", "--cuda", "0"]
    argv += ["--epochs", "4", "--batch_size", "64", "--lr", "0.05", "--save_root", str(tmp_path)]
    result = train_kd.main([*argv, *toys.small_flags(mode)])
    assert seen and result["best"] > 0
    for name, values in seen.items():
        assert all(0 < abs(value) < 1e9 for value in values), name
        if mode not in ("dml", "bss", "ttm", "wttm"):
            last = values[-20:]  # 1297 images: an epoch has 20 batches of 64 and the rest
            assert sum(last) / len(last) < sum(values[:10]) / 10, name


# --- networks that do not match -------------------------------------------------------------------


@pytest.mark.parametrize("mode", METHODS)
def test_a_wider_teacher(mode):
    """Adapters, built from the shapes that a dry pass shows, supply what a row needs."""
    distiller = toys.distiller(mode, toys.Toy((3, 5, 7, 9), last=1), toys.Toy())
    phase = distiller.phases[0]
    recipe = cli.resolve(toys.parse(["--kd_mode", mode, *DATA])[0], "x", {})
    optimizer = utils.sgd(distiller.set_trainable(phase), recipe)
    batch = toys.batch(dtype=torch.float32, strong=distiller.two_views)
    terms = train_kd.train_step(
        distiller, phase, optimizer, batch, toys.weights(distiller), utils.Precision()
    )
    assert all(value.isfinite() for value in terms.values())
    notes = distiller.added[0].adapter.notes
    assert any("projection" in note for note in notes) == ("channels" in METHODS[mode].match)


@pytest.mark.slow
def test_the_adapter_learns_and_is_announced(base, tmp_path, capsys):
    result = train_base.main(
        [*DATA, "--net_name", "resnet8x4", "--epochs", "1", "--save_root", str(tmp_path)]
    )
    capsys.readouterr()
    files = ["--t_model", f"{result['dir']}/model_best.pth.tar", "--s_name", "resnet8"]
    done = train_kd.main(["--kd_mode", "fitnet", *files, *FEW, "--save_root", str(tmp_path)])
    out = capsys.readouterr().out
    # 64 x 256 weights and batch norm's 2 x 256, on a 3-pixel map
    assert "the method adds 16,896 parameters and 147,456 multiply-adds" in out
    assert "adapter, stages0 64x3x3 -> 256x3x3: learnable projection" in out
    saved = read_checkpoint(Path(done["dir"]) / "checkpoint.pth.tar")
    assert any("adapter" in key for key in saved["kd"])
    assert set(saved["snet"]) == set(network.build("resnet8", 10).state_dict())


# --- phases, weights, composition -----------------------------------------------------------------


@pytest.mark.slow
def test_phases_scale_with_epochs(distil):
    rows = read_metrics(distil("fsp", "--epochs", "8", "--batch_size", "1297")["dir"])
    assert [row["phase"] for row in rows] == ["init"] * 2 + ["train"] * 8
    assert "kd" in rows[0] and "kd" not in rows[2]
    assert [row["lr"] for row in rows] == pytest.approx(
        [0.01] * 2 + [0.1] * 4 + [0.01] * 2 + [0.001] * 2
    )


def test_the_first_phase_s_rates():
    phase = METHODS["fsp"].phases[0]
    recipe = cli.resolve(toys.parse(["--kd_mode", "fsp", *DATA])[0], "x", {})
    rates = [schedule.learning_rate(phase, epoch, 50, recipe) for epoch in range(1, 51)]
    assert rates == pytest.approx([0.01] * 30 + [0.001] * 10 + [0.0001] * 10)


@pytest.mark.parametrize("epochs", [200, 20, 1])
@pytest.mark.parametrize("mode, weight", [("dkd", 1.0), ("bss", 2.0), ("st", 0.1)])
def test_ramps_scale_with_epochs(mode, weight, epochs):
    """At its own length the protocol's weight, epoch by epoch; shorter, the same curve in less
    time."""
    distiller = toys.distiller(mode)
    recipe = cli.resolve(toys.parse(["--kd_mode", mode, *DATA])[0], "x", {})
    expected = {
        "dkd": [min(e / 20, 1) for e in range(1, 201)],
        "bss": [0.0] * 10 + [2 * max(1 - 1.25 * (e - 1) / 200, 0) for e in range(11, 201)],
        "st": [0.1] * 200,
    }[mode]
    steps = 200 // epochs
    found = [
        schedule.loss_weights(
            distiller, distiller.phases[0], (epoch + step / steps) / epochs, recipe
        )["kd"]
        for epoch in range(epochs)
        for step in range(steps)
    ]
    assert found == pytest.approx(expected) and max(found) <= weight


def test_the_loss_is_the_weighted_sum():
    """One step against the sum written out, for a composed mode."""
    distiller = toys.distiller("st+at", argv=["--lambda_kd", "0.9,1000", "--lambda_ce", "0.3"])
    for module in (distiller.student.net, distiller.teacher.net, distiller.added):
        module.double()
    recipe = cli.resolve(toys.parse(["--kd_mode", "st", *DATA, "--lr", "1e-9"])[0], "x", {})
    batch = toys.batch()
    optimizer = utils.sgd(distiller.set_trainable(Phase()), recipe)
    terms = train_kd.train_step(
        distiller, Phase(), optimizer, batch, dict(kd_st=0.9, kd_at=1000.0), utils.Precision()
    )
    from kd_losses.at import AT
    from kd_losses.st import SoftTarget

    s, t = distiller.student(batch.img), distiller.teacher(batch.img)
    ce = torch.nn.functional.cross_entropy(s.out, batch.target)
    at = sum(AT()(a, b) for a, b in zip(s.stages, t.stages)) / 3
    loss = 0.3 * ce + 0.9 * SoftTarget()(s.out, t.out) + 1000 * at
    for p, grad in zip(
        distiller.student.net.parameters(),
        torch.autograd.grad(loss, [*distiller.student.net.parameters()]),
    ):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-6)
    assert list(terms) == ["ce", "kd_st", "kd_at", "train_top1"]


@pytest.mark.slow
@pytest.mark.parametrize("mode, compiled", [("at", 2), ("sobolev", 0)])
def test_compile_both_networks_or_say_why_not(mode, compiled, distil, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: calls.append(net))
    distil(mode, *FEW, "--compile")
    assert len(calls) == compiled
    assert ("not compiled" in capsys.readouterr().out) == (not compiled)


@pytest.mark.slow
def test_compiled_networks_train(distil):
    """Hooks see the maps, the checkpoint has the plain keys, the loss is that of eager networks."""
    plain, compiled = (
        Path(distil("at", *FEW, *more, note=f"r{len(more)}")["dir"]) for more in ([], ["--compile"])
    )
    one, two = (read_metrics(folder)[0] for folder in (plain, compiled))
    assert two["kd"] == pytest.approx(one["kd"], rel=0.05) and two["ce"] == pytest.approx(
        one["ce"], rel=0.05
    )
    keys = [weights(folder / "checkpoint.pth.tar").keys() for folder in (plain, compiled)]
    assert keys[0] == keys[1]


def test_composed_modes_train(distil):
    rows = read_metrics(distil("st+at+crd", *FEW, "--lambda_kd", "0.9,10,0.1")["dir"])
    assert {"kd_st", "kd_at", "kd_crd"} <= set(rows[0])


@pytest.mark.parametrize("modes", ["sobolev+st", "st+lwm", "lwm+sobolev"])
def test_second_derivatives_compose(modes):
    """Each part is tried on the same two images, whose graph the next one needs too."""
    train = toys.images()
    assert toys.distiller(modes, train=train).check_losses(train) == 0


def test_all_single_phase_methods_at_once():
    """One step of everything that composes; a flag that several have is given for one of them."""
    modes = [m for m, x in METHODS.items() if len(x.phases) == 1 and not x.deploys_projector]
    distiller = toys.distiller("+".join(modes), argv=["--dkd.T", "2"])
    found = {x.mode: x.settings.flags["T"] for x in distiller.added if "T" in x.settings.flags}
    assert found == {m: METHODS[m].flags["T"].default for m in found} | dict(dkd=2.0)
    recipe = cli.resolve(toys.parse(["--kd_mode", "st", *DATA, "--lr", "1e-9"])[0], "x", {})
    optimizer = utils.sgd(distiller.set_trainable(distiller.phases[0]), recipe)
    batch = toys.batch(dtype=torch.float32, strong=distiller.two_views)
    weights = toys.weights(distiller)
    terms = train_kd.train_step(
        distiller, distiller.phases[0], optimizer, batch, weights, utils.Precision()
    )
    assert {f"kd_{mode}" for mode in modes} < set(terms)
    assert all(value.isfinite() for value in terms.values())


def test_protocol_changes_the_settings():
    _, rows = toys.parse(["--kd_mode", "st", "--protocol", "crd"])
    assert (rows["st"].lambda_ce, rows["st"].lambda_kd) == (0.1, 0.9)
    _, rows = toys.parse(["--kd_mode", "at", "--protocol", "crd"])
    assert rows["at"].reduce == "sum"
    _, rows = toys.parse(["--kd_mode", "crd", "--protocol", "crd"])
    assert rows["crd"].flags["nce_t"] == 0.07 and rows["crd"].flags["nce_n"] == 16384
    _, rows = toys.parse(["--kd_mode", "crd", "--protocol", "crd", "--nce_t", "0.2"])
    assert rows["crd"].flags["nce_t"] == 0.2


@pytest.mark.parametrize(
    "mode, protocol",
    tiers(
        [(mode, protocol) for mode in METHODS for protocol in published.PROTOCOLS],
        *[(mode, x) for x, modes in published.SETTINGS.items() for mode in modes],
    ),
)
def test_every_mode_under_every_protocol(mode, protocol):
    """Its flags parse, also when its defaults are given; its comparison fits ResNets of two
    widths."""
    argv = ["--kd_mode", mode, "--protocol", protocol]
    flags, given = toys.parse(argv)[1][mode].flags, []
    for name, flag in METHODS[mode].flags.items():
        if flag.only is None or flags[flag.only[0]] == flag.only[1]:
            given += [f"--{name}", str(int(flags[name]) if flag.kind is bool else flags[name])]
    assert toys.parse(argv + given)[1][mode].flags == flags
    nets = network.build("resnet8", 5), network.build("resnet8x4", 5)
    distiller = toys.distiller(mode, *nets, toys.images(size=16), argv=["--protocol", protocol])
    distiller.check_losses(toys.images(size=16))
    phase = distiller.phases[0]
    recipe = cli.resolve(toys.parse([*argv, *DATA])[0], "x", {})
    optimizer = utils.sgd(distiller.set_trainable(phase), recipe)
    batch = toys.batch(dtype=torch.float32, size=16, strong=distiller.two_views)
    terms = train_kd.train_step(
        distiller, phase, optimizer, batch, toys.weights(distiller), utils.Precision()
    )
    assert all(value.isfinite() for value in terms.values())


def test_a_dry_run_says_the_recipe_and_writes_nothing(distil, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert distil("fsp", "--dry_run", "--protocol", "crd") is None
    out = capsys.readouterr().out
    assert "lambda_kd 1.0" in out and "phases: init 30 epoch(s), train 240 epoch(s)" in out
    assert "nothing trained, nothing written" in out and sorted(tmp_path.rglob("*")) == before


def test_stages_and_reduce():
    batch = toys.batch(dtype=torch.float32)
    one, two = (toys.distiller("at", argv=["--stages", s, "--reduce", "sum"]) for s in ("1,3", "2"))
    whole = toys.distiller("at", argv=["--reduce", "sum"])
    values = []
    for distiller in (one, two, whole):
        distiller.student.net.load_state_dict(whole.student.net.state_dict())
        distiller.teacher.net.load_state_dict(whole.teacher.net.state_dict())
        part = distiller.added[0]
        values.append(part(distiller.student(batch.img), distiller.teacher(batch.img), batch))
    torch.testing.assert_close(values[0] + values[1], values[2])


def test_weight_by_number_of_classes():
    weight = METHODS["crd"].lambda_kd
    assert (weight(10), weight(100)) == (0.2, 0.8)


def test_equal_learners_are_refused(base, tmp_path, capsys):
    same_file = str(base / "resnet8" / "initial_r8.pth.tar")
    argv = ["--kd_mode", "dml", "--t_model", same_file, "--cuda", "0", "--dry_run"]
    with ends(capsys):
        train_kd.main([*argv, "--s_init", same_file])
    train_kd.main([*argv, "--s_name", "resnet8", "--seed", "5"])  # nothing else is wrong


def test_two_fresh_learners_differ(tmp_path):
    argv = ["--kd_mode", "dml", "--net1_name", "resnet8", "--net2_name", "resnet8", *DATA, *FEW]
    folder = Path(train_kd.main([*argv, "--save_root", str(tmp_path)])["dir"])
    saved = read_checkpoint(folder / "checkpoint.pth.tar")
    assert not same(saved["net1"], saved["net2"])


# --- the table and the help -----------------------------------------------------------------------


def test_no_mode_name_in_the_loop():
    """train_kd.py knows no method: none of its strings, docstrings apart, is a mode's name."""
    tree = ast.parse((ROOT / "train_kd.py").read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and isinstance(node.body[0], ast.Expr)
    }
    strings = [
        n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    found = {n.value for n in strings if id(n) not in docs} & set(METHODS)
    assert not found and len(strings) > 50


def test_help_lists_the_rows(capsys):
    with pytest.raises(SystemExit) as stop:
        train_kd.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    listed = text.split("Methods: ")[1].split(" --")[0].split(", ")
    assert listed == list(METHODS)


def test_help_of_a_mode_shows_its_flags(capsys):
    with pytest.raises(SystemExit):
        train_kd.main(["--kd_mode", "at", "--help"])
    out = capsys.readouterr().out
    assert "--p X" in out and "(default 2.0)" in out and "--nce_n" not in out


# --- NaN and infinite numbers ---------------------------------------------------------------------


def test_a_diverging_run_stops_with_the_term(distil, capsys):
    with ends(capsys, "--lr"):
        distil("fitnet", *FEW, "--lr", "1e30", "--print_freq", "1")


# --- what goes wrong is said ----------------------------------------------------------------------


def warnings(capsys):
    return [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning:")]


def test_a_teacher_no_better_than_chance_is_said(distil, capsys):
    distil("st", "--epochs", "1")
    assert any(names(line, "teacher") for line in warnings(capsys))


@pytest.mark.parametrize(
    "top1, n, classes, says", [(10.4, 500, 10, True), (15, 500, 10, False), (1.2, 10000, 100, True)]
)
def test_chance(top1, n, classes, says):
    assert utils.by_chance(top1, n, classes) is says


@pytest.mark.slow
def test_an_initial_student_that_is_trained_is_said(base, distil, capsys):
    trained = base / "resnet8" / "model_best.pth.tar"
    distil("st", "--epochs", "1", "--s_init", trained)
    assert any(names(line, "--s_init", trained, 1) for line in warnings(capsys))
    distil("st", "--epochs", "1", note="other")
    assert "s_init" not in " ".join(warnings(capsys))


@pytest.mark.slow
def test_a_term_that_drowns_the_cross_entropy_is_said_once(distil, capsys):
    argv = ["--epochs", "2", "--lr", "1e-9", "--print_freq", "2"]
    distil("st", *argv, "--lambda_kd", "1e6")
    assert len([line for line in warnings(capsys) if names(line, "kd")]) == 1
    distil("st", *argv, note="other")
    assert not [line for line in warnings(capsys) if names(line, "kd")]


@pytest.fixture
def broken(monkeypatch):
    """Soft targets whose every third loss is no number."""
    forward, calls = METHODS["st"].loss.forward, [0]

    def sometimes(self, *args):
        calls[0] += 1
        return forward(self, *args) * (float("nan") if calls[0] % 3 == 0 else 1)

    monkeypatch.setattr("kd_losses.st.SoftTarget.forward", sometimes)


@pytest.mark.slow
def test_steps_without_a_number_can_be_left_out(broken, distil, capsys):
    folder = distil("st", "--epochs", "2", "--on_nan", "skip")["dir"]
    lines = Counter(capsys.readouterr().out.splitlines())
    assert max(lines.values()) >= 6, "each step that is left out is said"
    for row in read_metrics(folder):
        assert all(value == value for value in row.values()) and row["kd"] > 0
    saved = read_checkpoint(f"{folder}/checkpoint.pth.tar")
    assert all(x.isfinite().all() for x in saved["snet"].values())


def test_steps_without_a_number_stop_the_run(broken, distil, tmp_path, capsys):
    with ends(capsys, "distil", 1, 2, "kd", "--lr"):
        distil("st", "--epochs", "2", "--print_freq", "1")
    assert not (tmp_path / "r" / "checkpoint.pth.tar").exists()


def test_no_number_at_all_stops_the_run_that_leaves_them_out(distil, monkeypatch, capsys):
    def broken(self, s, t):
        return s.sum() * float("nan" if s.requires_grad else 1)  # not when it is rehearsed

    monkeypatch.setattr("kd_losses.st.SoftTarget.forward", broken)
    with ends(capsys, "--lr"):
        distil("st", "--epochs", "1", "--on_nan", "skip", "--print_freq", "100")


def test_a_fresh_student_is_the_baseline_of_its_seed(base):
    """--s_name with the seed of a baseline and --s_init with its initial weights are the same
    start."""
    initial = weights(base / "resnet8" / "initial_r8.pth.tar")
    fresh = Weights("resnet8").build(10, 2, 12).state_dict()
    assert initial.keys() == fresh.keys() and same(initial, fresh)

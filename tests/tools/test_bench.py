import copy
import json
import math
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from messages import ends

import network
import train_kd
import utils
from engine import kd_cli
from engine.checkpoint import Weights, read_checkpoint
from engine.run import read_metrics
from engine.together import SharedTeacher
from kd_losses import METHODS, crd
from tools import (
    bench,
    bench_data,
    bench_loss,
    bench_meter,
    bench_steps,
    bench_together,
    plain_losses,
)

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TINY = ["--cuda", "0", "--rounds", "1"]
STEP = ["step", *TINY, "--student", "resnet8", "--teacher", "resnet8", "--num_class", "4"]
STEP += ["--batch_size", "8", "--samples", "40", "--steps", "1"]
LOSS = ["loss", *TINY, "--student", "resnet8", "--teacher", "resnet8", "--batch_size", "4"]
LOSS += ["--n_data", "40"]
DATA = ["data", *TINY, "--samples", "24", "--images", "12", "--batch_size", "4", "--workers", "0"]
DATA += ["--img_size", "97", "--batches", "3"]


REAL = bench_meter.quick_or_slow


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(
        bench_loss,
        "quick_or_slow",
        lambda calls, rounds, device: bench_meter.take_turns(calls, 1, 1, device),
    )
    # CRD's flag for as few negatives as there are samples
    own = METHODS["crd"].flags
    flags = own | dict(nce_n=replace(own["nce_n"], default=32))
    monkeypatch.setitem(METHODS, "crd", replace(METHODS["crd"], flags=flags))


def tables(text):
    """{title: cell} of every row of the Markdown table in `text`."""
    lines = [x for x in text.splitlines() if x.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set(cells[1]) == {"---"}
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def same(text, result, columns):
    """The table has the figures of the JSON, rounded."""
    table = tables(text)
    assert len(table) == len(result["rows"])
    for shown, row in zip(table, result["rows"]):
        for key, (title, form) in columns.items():
            value = row.get(key)
            assert shown[title] == ("-" if value is None else format(value, form))
    return table


# --- the commands ---------------------------------------------------------------------------------


def test_step(tmp_path, capsys):
    """Every mode has a row, in the order of the table of methods, and a budget."""
    result = bench.main([*STEP, "--json", str(tmp_path / "step.json")])
    out = capsys.readouterr().out
    assert json.loads((tmp_path / "step.json").read_text()) == result
    table = same(out, result, bench.STEP)
    assert [row["mode"] for row in table] == ["train_base", *METHODS]
    assert [row["phase"] for row in table if row["mode"] in ("fsp", "ab", "ft", "dkd")] == [
        "init, only its loss",
        "distil",
        "init, only its loss",
        "distil",
    ]
    for row in result["rows"]:
        assert row["ratio_min"] == row["ratio"] == row["ratio_max"], "of one round"
        assert row["ratio"] == pytest.approx(row["step_ms"] / row["bare_ms"], rel=1e-4)
        assert row["img_per_s"] == pytest.approx(8000 / row["step_ms"], rel=1e-4)
        assert (row["met"] is None) == (row["mode"] == "train_base")
    head = out.splitlines()
    where = utils.describe_device(torch.device("cpu"), utils.precision(torch.device("cpu")))
    assert where in head[0] and torch.__version__ in head[1]
    assert "batch_size 8, num_class 4, samples 40, steps 1, rounds 1" in head[2]
    assert head[3].startswith("load average before the run ")


def test_loss(capsys):
    """Every mode has a row; with --json - stdout has only the JSON."""
    result = bench.main([*LOSS, "--json", "-"])
    captured = capsys.readouterr()
    assert json.loads(captured.out) == result
    table = same(captured.err, result, bench.LOSS)
    assert [row["mode"] for row in table] == list(METHODS)
    without = [row["mode"] for row in result["rows"] if "ms" not in row]
    assert without == ["sobolev", "bss", "lwm"]
    for row in result["rows"]:
        assert row["mode"] in without or row["memory_mb"] >= row["state_mb"]
        assert ("faster" in row) == (row["mode"] in plain_losses.BROADCAST)
        assert row.get("difference", 0) < 1e-4


def test_crd_s_two_paths(monkeypatch, capsys):
    """Both ways run, alternately, for any size; afterwards the size decides again."""
    before, seen = crd.GATHER, []
    side = crd.CRD._side

    def look(*args):
        seen.append(crd.GATHER)
        return side(*args)

    monkeypatch.setattr(crd.CRD, "_side", look)
    result = bench.main([*LOSS, "--modes", "crd", "--crd_paths"])
    same(capsys.readouterr().out, result, bench.LOSS)
    assert crd.GATHER == before and seen[::2] == seen[1::2], "two sides a call"
    # two to warm up and one in the round, then one and the memory's of each
    assert seen[::2] == [0, 0, math.inf, math.inf, 0, math.inf, 0, 0, math.inf, math.inf]
    rows, whole = result["rows"]
    assert (rows["mode"], whole["mode"]) == ("crd, rows gathered", "crd, whole bank")
    assert all(row["ms"] > 0 and row["cpu_ms"] > 0 for row in (rows, whole))
    assert rows["state_mb"] == whole["state_mb"] and rows["budget"] == "2 x banks + 5 x (4, 40)"


def test_data(capsys):
    result = bench.main(DATA)
    table = same(capsys.readouterr().out, result, bench.DATA)
    assert [row["pixels"] for row in table] == ["32"] * 2 + ["97"] * 8
    for row in result["rows"]:
        assert row["batch_ms"] == pytest.approx(4000 / row["img_per_s"], rel=1e-4)
    for own, plain in zip(result["rows"][::2], result["rows"][1::2]):
        assert own["ratio"] == pytest.approx(own["img_per_s"] / plain["img_per_s"], rel=1e-4)
        assert own["met"] == ("yes" if own["ratio"] >= 1 else "no") and "ratio" not in plain


def test_loaders_take_turns(monkeypatch, capsys):
    """Our loader and the plain one alternate; the ratio is taken within a round."""
    speeds, order = iter([6.0, 3.0, 8.0, 8.0, 5.0, 10.0] * 5), []

    def throughput(batches, workers, count, device):
        order.append(type(batches).__name__)
        return next(speeds)

    monkeypatch.setattr(bench_data, "throughput", throughput)
    rows = bench.main([*DATA, "--rounds", "3"])["rows"]
    assert order == ["generator", "DataLoader"] * 15
    assert [(row["ratio"], row["img_per_s"], row["met"]) for row in rows[::2]] == [
        (1, 6, "yes")
    ] * 5
    assert (rows[0]["ratio_min"], rows[0]["ratio_max"], rows[1]["img_per_s"]) == (0.5, 2, 8)


def test_epoch(capsys):
    """Three rows; checkpoints and logs go to a temporary folder, and stdout has only the JSON."""
    argv = ["epoch", *STEP[1:], "--json", "-"]
    result = bench.main(argv)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == result
    same(captured.err, result, bench.EPOCH)
    loader, evaluation, files = result["rows"]
    assert 1 + loader["share"] / 100 == pytest.approx(loader["own_ms"] / loader["other_ms"], 1e-4)
    assert evaluation["share"] == pytest.approx(
        100 * evaluation["other_ms"] / evaluation["own_ms"], rel=1e-4
    )
    assert 0 < files["own_ms"] < files["other_ms"] and 0 < files["share"] < 100


TOGETHER = [*TINY, "--pairs", "resnet8-resnet8", "--num_class", "4", "--batch_size", "8"]
TOGETHER += ["--samples", "40", "--steps", "1"]


def test_together(capsys):
    result = bench.main(["together", *TOGETHER, "--counts", "1,3"])
    same(capsys.readouterr().out, result, bench.TOGETHER)
    one, three = result["rows"]
    assert (one["students"], three["students"]) == (1, 3) and one["bound"] == 1.0
    share = three["teacher"]
    assert three["bound"] == pytest.approx((share + 3 * (1 - share)) / 3, rel=1e-4)
    assert three["macs_share"] == pytest.approx(0.25, abs=1e-6)  # equal networks


def test_cache(capsys):
    result = bench.main(["cache", *TOGETHER, "--modes", "st,rkd"])
    same(capsys.readouterr().out, result, bench.CACHE)
    assert [row["mode"] for row in result["rows"]] == ["st", "rkd"]
    assert all(0 <= row["difference"] < 0.1 for row in result["rows"])


def test_together_takes_the_steps_of_training(monkeypatch):
    """After four steps the weights equal those of four separate steps on the same batches."""
    args = Namespace(student="resnet8", teacher="resnet14", num_class=4, batch_size=8, samples=40)
    images = bench_steps.random_images(40, 4)
    snet, tnet = bench_steps.pair(args, images)
    precision = utils.Precision(CPU)
    learning = Namespace(**vars(bench_steps.recipe()) | dict(lr=0.1))
    monkeypatch.setattr(bench_together, "recipe", lambda: learning)
    modes = ["st", "at"]
    group = bench_together.students_of(modes, args, CPU, images, snet, tnet)
    shared = SharedTeacher(group, precision)
    together = bench_together.group_step(group, args, precision, images, shared)
    alone = []
    for mode in modes:
        (own,) = bench_together.students_of([mode], args, CPU, images, snet, tnet)
        alone.append(own)
        call = bench_together.group_step(
            [own], args, precision, images, SharedTeacher([own], precision)
        )
        [call() for _ in range(4)]
    [together() for _ in range(4)]
    for one, other in zip(group, alone):
        assert utils.equal_states(one.student.net, other.student.net)
        assert not utils.equal_states(one.student.net, snet)


def test_what_an_epoch_writes(tmp_path):
    """Both checkpoints with everything that training puts into them, and 201 rows."""
    args = Namespace(student="resnet8", teacher="resnet8", num_class=4, batch_size=8)
    images, where = bench_steps.random_images(40, 4), (torch.device("cpu"), utils.Precision())
    write = bench.writing(args, *where, images, bench_steps.pair(args, images), tmp_path, 1000)
    write()
    saved = read_checkpoint(tmp_path / "run/checkpoint.pth.tar")
    assert {"snet", "kd", "optimizer", "rng", "history"} <= saved.keys()
    assert saved["optimizer"]["state"], "momenta are a large part of a checkpoint"
    assert (tmp_path / "run/model_best.pth.tar").exists()
    assert len(read_metrics(tmp_path / "run")) == 201
    lines = (tmp_path / "run/log.txt").read_text().splitlines()
    assert len(lines) == 1 + 1000 // kd_cli.parse(["--kd_mode", "st"], "").print_freq


def test_verdict_of_a_share():
    verdicts = [bench.share_row("", [1], [1], [x], "at least 90")["met"] for x in (91.0, 89.0)]
    verdicts += [bench.share_row("", [1], [1], [x], "at most 3")["met"] for x in (2.0, 4.0)]
    assert verdicts == ["yes", "no", "yes", "no"]


def test_profile(capsys):
    result = bench.main([*STEP, "--profile", "pkt"])
    rows = same(capsys.readouterr().out, result, bench.OPERATORS)
    assert any("convolution" in row["operator"] for row in rows)
    *operators, everything, step = result["rows"]
    assert sum(row["self_ms"] for row in operators) <= everything["self_ms"] * 1.0001


@pytest.mark.parametrize(
    "argv, wanted",
    [
        ([], ["command"]),
        (["speed"], ["speed"]),
        (["step", "--modes", "st,ta"], ["--modes", "ta"]),
        (["step", "--profile", "ta"], ["--kd_mode", "ta"]),
        (["step", "--student", "resnet9"], ["resnet9"]),
        (["step", "--size", "cifar"], ["--size"]),
        (["loss", "--student", "resnet8"], ["--student", "resnet8", "--teacher"]),
        (["loss", "--amp", "bf16"], ["--amp"]),
        (["loss", "--json", "/nowhere/x.json"], ["--json", "/nowhere/x.json"]),
        (["data", "--img_size", "32"], ["--img_size", "97", "32"]),
        ([*DATA, "--images", "4"], ["--images"]),
    ],
)
def test_bad_input_is_one_line(argv, wanted, capsys):
    with ends(capsys, *wanted):
        bench.main(argv)


# --- measured steps -------------------------------------------------------------------------------


def test_a_step_is_that_of_training(monkeypatch):
    """Trained modules, batches and weights are those of train_kd.py; bss attacks with its full
    weight; mlkd has two views."""
    images = bench_steps.random_images(40, 4)
    args = Namespace(student="resnet8", teacher="resnet8", num_class=4, batch_size=8)
    nets = bench_steps.pair(args, images)
    seen = []
    step = train_kd.train_step

    def look(distiller, phase, optimizer, batch, weights, precision):
        terms = step(distiller, phase, optimizer, batch, weights, precision)
        seen.append((weights, len(batch.target), terms))
        return terms

    monkeypatch.setattr(train_kd, "train_step", look)
    count = dict(bss=2 + 10 + 2, mlkd=4)  # the attack takes all its steps
    for mode in ("bss", "reviewkd", "fsp", "mlkd"):
        call, _ = bench_steps.full_step(
            mode, args, torch.device("cpu"), utils.Precision(), images, *nets
        )
        with passes() as runs:
            call()
        assert len(runs) == count.get(mode, 2)
    weights, sizes, terms = zip(*seen)
    assert [x["kd"] for x in weights] == [0.75, 1.0, 1.0, 0.09] and sizes == (8, 8, 8, 8)
    assert all(term["kd"].isfinite() for term in terms)


def test_the_bare_step_runs_the_teacher_without_gradient():
    images = bench_steps.random_images(40, 4)
    args = Namespace(student="resnet8", teacher="resnet8", num_class=4, batch_size=8)
    nets = bench_steps.pair(args, images)
    assert all(net.bn1.running_var.isfinite().all() and net.bn1.momentum == 0.1 for net in nets)
    for alone, grads in ((True, [True]), (False, [False, True])):
        call = bench_steps.bare_step(
            args, torch.device("cpu"), utils.Precision(), images, *nets, alone
        )
        with passes() as runs:
            call()
        assert [out.requires_grad for out in runs] == grads


@contextmanager
def passes():
    """The logits of every forward pass of a network."""
    outs = []

    def look(module, args, out):
        if isinstance(module, network.CifarResNet):
            outs.append(out)

    handle = torch.nn.modules.module.register_module_forward_hook(look)
    yield outs
    handle.remove()


def test_turns():
    """a b a b in each round, after two calls of each to warm up."""
    order = []
    found = bench_meter.take_turns(
        [lambda: order.append("a"), lambda: order.append("b")], 3, 2, CPU
    )
    assert "".join(order) == "aabb" + 3 * "abab"
    assert [len(times) for times in found] == [3, 3]


def test_rounds_suit_what_is_measured(monkeypatch):
    """(calls per round, rounds) depend on the seconds of a call; a slow one gets three rounds."""
    found = []
    monkeypatch.setattr(
        bench_meter, "take_turns", lambda _, rounds, steps, __: found.append((steps, rounds))
    )
    for once in (1e-5, 0.005, 0.01, 1, 10, 30):
        monkeypatch.setattr(bench_meter, "seconds", lambda *_: once)  # noqa: B023
        REAL([None, None], 7, CPU)
    assert found == [(50, 7), (5, 7), (2, 7), (1, 7), (1, 3), (1, 3)]


def test_ratio_is_taken_round_by_round():
    row = bench.step_row("vid", "distil", [1.0, 2.0, 10.0], [1.2, 2.6, 11.0], 64)
    assert row["ratio"] == pytest.approx(1.2) and row["budget"] == 1.35
    assert (row["ratio_min"], row["ratio_max"]) == (pytest.approx(1.1), pytest.approx(1.3))
    assert row["bare_ms"] == 2000 and row["img_per_s"] == pytest.approx(64 / 2.6)


def test_budgets():
    assert set(bench.BUDGET) <= set(METHODS)
    assert [bench.verdict(x, 1.2) for x in (1.0, 1.15, 1.16, 1.2, 1.21)] == [
        "yes",
        "yes",
        "just",
        "just",
        "no",
    ]
    assert bench.verdict(9.0, None) is None


def nets():
    return [Weights(name).build(5, 0, 32).eval() for name in ("resnet8", "resnet8x4")]


@pytest.mark.parametrize(
    "mode, words, limit",
    [
        ("st", "64 MB", lambda inputs, bank: 64e6),
        ("sp", "2 x inputs", lambda inputs, bank: 2 * inputs),
        ("vid", "6 x inputs", lambda inputs, bank: 6 * inputs),
        ("fitnet", "6 x inputs", lambda inputs, bank: 6 * inputs),  # by its adapter
        ("crd", "2 x banks + 5 x (6, 40)", lambda inputs, bank: 2 * bank + 5 * 4 * 6 * 40),
    ],
)
def test_budgets_of_memory(mode, words, limit):
    loss = bench_loss.Loss(mode, nets(), 32, 5, 40, "contiguous", 6)
    s, t, _ = loss.features(6, CPU)
    inputs = loss.inputs(s, t)
    size = sum(x.numel() * 4 for x in inputs)
    bank = 2 * 40 * 128 * 4 + 2 * 4 + 8 * (2 * 40 + 2 * 5)  # also Z, labels, their order
    assert loss.budget(inputs, 6) == (words, limit(size, bank))
    if mode == "sp":
        assert size == 4 * 6 * (16 * 32**2 + 32 * 16**2 + 64 * 8**2) * (1 + 4)


def test_memory_meter():
    """Known allocations: released memory is subtracted, memory from before does not count."""
    there = torch.empty(10_000, dtype=torch.uint8)

    def call():
        a = torch.empty(4000, dtype=torch.uint8)
        b = torch.empty(2000, dtype=torch.uint8)
        del a
        c = there[:3000].clone()
        return b, c

    assert bench_meter.peak_bytes(call, CPU) == 6000
    assert bench_meter.peak_bytes(lambda: None, CPU) == 0
    x = torch.ones(1000, requires_grad=True)
    # x^2, its sum and the gradients of both; that of x is among them
    assert 4000 < bench_meter.peak_bytes(lambda: (x * x).sum().backward(), CPU) <= 3 * 4000 + 64


@pytest.mark.parametrize("mode", [m for m in METHODS if m not in ("sobolev", "bss", "lwm")])
def test_inputs_are_what_the_comparison_reads(mode):
    """Every input of the student affects the loss; the teacher's are constants, except for dml."""
    loss = bench_loss.Loss(mode, nets(), 32, 5, 40, "channels_last", 4)
    s, t, batch = loss.features(4, CPU)
    loss.call(loss.criterion, s, t, batch)()
    both = loss.inputs(s, t)
    learning = [x for x in both if x.requires_grad]
    own = [getattr(s, kind) for kind in loss.reads[0]] + ([s.strong.out] if s.strong else [])
    count = sum(1 if torch.is_tensor(x) else len(x) for x in own)
    assert len(learning) == (len(both) if mode == "dml" else count)
    assert all(x.grad.isfinite().all() for x in learning)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in both if x.ndim == 4)
    if mode in ("catkd", "sdd"):
        assert s.classifier.weight.grad.isfinite().all()
    if mode in bench_loss.HEADS:
        assert t.classifier.weight.grad is None


# --- the broadcast versions -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", plain_losses.BROADCAST)
def test_broadcast_versions_are_the_same_losses(mode):
    """Equal values and equal gradients for the student; crd also in a second step."""
    loss = bench_loss.Loss(mode, nets(), 32, 5, 40, "channels_last", 6)
    criteria = copy.deepcopy(loss.criterion).double(), loss.broadcast().double()
    results = []
    for criterion in criteria:
        results.append([])
        for step in range(2):
            s, t, batch = loss.features(6, CPU)
            s, t = double(s), double(t)
            torch.manual_seed(step)  # of crd's draws
            value = criterion(s, t, batch, loss.phase.inputs)
            leaves = [x for x in loss.inputs(s, t) if x.requires_grad]
            results[-1] += [value.detach(), *torch.autograd.grad(value, leaves)]
    for own, other in zip(*results):
        assert own.abs().max() > 0
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4 * own.abs().max().item())


def double(features):
    """The same features as leaves of float64, with both signs."""

    def leaf(x):
        return (x - x.mean()).detach().double().requires_grad_(x.requires_grad)

    values = {}
    for kind in ("out", "stem", "stages", "preacts", "feat"):
        value = getattr(features, kind)
        if torch.is_tensor(value):
            values[kind] = leaf(value)
        elif value:
            values[kind] = [leaf(x) for x in value]
    return replace(features, **values)


def test_broadcast_versions_fit(monkeypatch):
    """Fewer samples if the largest tensor would be too large, but at least three."""
    loss = bench_loss.Loss("nst", nets(), 32, 5, 40, "contiguous", 16)
    largest = 4 * 256 * 256 * 64  # bytes a sample
    monkeypatch.setattr(bench_loss, "FIT", 12 * largest)
    assert (loss.fitting(12), loss.fitting(16)) == (12, 12)
    monkeypatch.setattr(bench_loss, "FIT", 1)
    assert loss.fitting(16) == 3

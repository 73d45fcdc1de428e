"""What every row of the table of methods promises: numbers, degenerate inputs, state, independence."""

import ast
import copy
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys
from torch._subclasses.fake_tensor import FakeTensorMode

import train_kd
import utils
from engine import published
from engine.checkpoint import read_checkpoint, save_checkpoint
from kd_losses import FLAG_HELP, METHODS, Phase

ROOT = Path(__file__).parent.parent
MODES = list(METHODS)
FLOAT32 = utils.Machine(torch.device("cpu"), bf16=False)


def each(features, f):
    """`features` with f applied to every tensor in them."""
    one = {k: getattr(features, k) for k in ("stem", "last", "feat")}
    one = {k: x if x is None else f(x) for k, x in one.items()}
    maps = dict(stages=[f(x) for x in features.stages], preacts=[f(x) for x in features.preacts])
    strong = features.strong and each(features.strong, f)
    return replace(features, out=f(features.out), strong=strong, **one, **maps)


def compares(row):
    """The row's comparison and those that its phases bring."""
    return [row.compare, *(p.kd for p in row.phases if callable(p.kd) and p.kd is not row.compare)]


def features(job, batch, grad=True):
    """Features of both networks, with the graph down to the image."""
    batch.img.requires_grad_(grad)
    if job.strong:
        batch.strong = batch.img + 0.1
    return batch.seen_by(job.student), batch.seen_by(job.teacher)


def inside_graph(row):
    return row.teacher == "grad" and "stages" in row.compare.wants


def changed(job, batch, change_s, change_t):
    """Features of both networks, every tensor changed. A loss that differentiates in the maps gets
    them changed inside the networks: the logits hang on what it sees."""
    inside = inside_graph(job.kd[0].row)
    if inside:
        for net, change in ((job.student.net, change_s), (job.teacher.net, change_t)):
            for i in job.kd[0].row.stages:
                net.get_submodule(net.taps["stages"][i]).f = change
    s, t = features(job, batch)
    if inside:
        return replace(s, out=change_s(s.out)), replace(t, out=change_t(t.out))
    return each(s, change_s), each(t, change_t)


def value(part, compare, s, t, batch):
    torch.manual_seed(1)  # of what a loss draws
    return part(compare, s, t, batch)


def double(job):
    for module in (job.student.net, job.teacher.net, job.kd):
        module.double()
    return job


# --- 1 and 2: precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_float64_stays_float64(mode):
    job, batch = double(toys.job(mode)), toys.batch()
    s, t = features(job, batch)
    for compare in compares(job.kd[0].row):
        loss = value(job.kd[0], compare, s, t, batch)
        assert loss.dtype == torch.float64 and loss.shape == () and loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_right_under_autocast(mode, dtype):
    """Half-precision channels_last inputs under an active autocast, against float64."""
    job, batch = toys.job(mode), toys.batch()
    part = job.kd[0].eval()
    exact = copy.deepcopy(part).double()
    for net in (job.student.net, job.teacher.net):
        net.double()

    def half(x):
        x = x.to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    s, t = changed(job, batch, half, half)
    for compare in compares(part.row):
        s64, t64 = (
            # maps inside a graph stay as they are: the loss promotes them to float32
            x if inside_graph(part.row) else each(x, torch.Tensor.double)
            for x in (s, t)
        )
        expected = value(exact, compare, s64, t64, batch).item()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = value(part, compare, s, t, batch)
        assert loss.dtype in (torch.float32, torch.float64)
        assert loss.item() == pytest.approx(expected, rel=1e-2, abs=1e-9)
        # and without autocast, the inputs alone being half
        assert value(part, compare, s, t, batch).item() == pytest.approx(
            expected, rel=1e-2, abs=1e-9
        )


# --- 3: degenerate inputs --------------------------------------------------------------------------


def _double_first(x):
    return torch.cat([x[:1], x[:1], x[2:]])


DEGENERATE = {
    "zeros": (lambda x: x * 0, lambda x: x * 0),
    "student zero": (lambda x: x * 0, lambda x: x),
    "teacher zero": (lambda x: x, lambda x: x * 0),
    "duplicates": (_double_first, _double_first),
    "all the same": (lambda x: x[:1].expand_as(x), lambda x: x[:1].expand_as(x)),
    "huge": (lambda x: x * 1e4, lambda x: x * 1e4),
    "tiny": (lambda x: x * 1e-12, lambda x: x * 1e-12),
    "near underflow": (lambda x: x * 1e-20, lambda x: x * 1e-20),
}


def finite(job, loss):
    params = [*job.student.net.parameters(), *job.kd.parameters()]
    params = [p for p in params if p.requires_grad]
    grads = torch.autograd.grad(loss, params, allow_unused=True) if loss.requires_grad else []
    return loss.isfinite() and all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("mode", MODES)
def test_degenerate_features(mode, kind):
    job, batch = toys.job(mode), toys.batch(dtype=torch.float32)
    change_s, change_t = DEGENERATE[kind]
    for compare in compares(job.kd[0].row):
        loss = value(job.kd[0], compare, *changed(job, batch, change_s, change_t), batch)
        assert finite(job, loss)


@pytest.mark.parametrize("mode", MODES)
def test_student_equal_to_teacher(mode):
    job, batch = toys.job(mode), toys.batch(dtype=torch.float32)
    # all but a classifier that one of them may not have
    job.teacher.net.load_state_dict(job.student.net.state_dict(), strict=False)
    for compare in compares(job.kd[0].row):
        assert finite(job, value(job.kd[0], compare, *features(job, batch), batch))


@pytest.mark.parametrize("mode", MODES)
def test_all_targets_equal_and_two_classes(mode):
    job = toys.job(mode, toys.Toy(num_class=2), toys.Toy(num_class=2), toys.images(num_class=2))
    batch = toys.batch(num_class=2, dtype=torch.float32)
    batch.target.zero_()
    for compare in compares(job.kd[0].row):
        assert finite(job, value(job.kd[0], compare, *features(job, batch), batch))


@pytest.mark.parametrize("mode", MODES)
def test_logits_200_apart(mode):
    job, batch = toys.job(mode), toys.batch(dtype=torch.float32)
    for compare in compares(job.kd[0].row):
        s, t = features(job, batch)
        first = torch.eye(s.out.shape[1])[0], torch.eye(5)[0]
        s, t = replace(s, out=s.out + 200 * first[0]), replace(t, out=t.out - 200 * first[1])
        assert finite(job, value(job.kd[0], compare, s, t, batch))


@pytest.mark.parametrize("mode", MODES)
def test_maps_of_one_pixel(mode):
    job = toys.job(mode, toys.Toy(last=1), toys.Toy(last=1))
    batch = toys.batch(dtype=torch.float32)
    for compare in compares(job.kd[0].row):
        assert finite(job, value(job.kd[0], compare, *features(job, batch), batch))


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_one(mode):
    """Finite, or one clear ValueError."""
    job, batch = toys.job(mode), toys.batch(n=1, dtype=torch.float32)
    for compare in compares(job.kd[0].row):
        try:
            loss = value(job.kd[0].train(), compare, *features(job, batch), batch)
        except ValueError as error:
            assert "two" in str(error) and mode in NOT_ON_ONE
        else:
            assert finite(job, loss) and mode not in NOT_ON_ONE


# defined on pairs of samples, or with a batch norm that would see a single value
NOT_ON_ONE = ("rkd", "irg", "reviewkd", "dist", "itrd")


# --- 4: state --------------------------------------------------------------------------------------


def world(mode):
    job = toys.job(mode, toys.Toy((3, 4, 6, 8)), toys.Toy((4, 4, 8, 8)))
    recipe = Namespace(lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=1)
    return job, recipe


def take(job, phase, optimizer, n):
    """Step number n."""
    torch.manual_seed(100 + n)
    batch = toys.batch(dtype=torch.float32, strong=job.strong)
    batch.index += n
    train_kd.train_step(job, phase, optimizer, batch, [1.0] * len(job.kd), FLOAT32)


def everything(job, optimizer):
    nets = dict(s=job.student.net, t=job.teacher.net, kd=job.kd)
    return {
        **{name: net.state_dict() for name, net in nets.items()},
        "optimizer": optimizer.state_dict(),
    }


@pytest.mark.parametrize("mode", MODES)
def test_save_and_load_between_two_steps(mode, tmp_path):
    for i, phase in enumerate(METHODS[mode].phases):
        torch.manual_seed(0)
        job, recipe = world(mode)
        optimizer = utils.sgd(job.learners(phase), recipe)
        take(job, phase, optimizer, 0)
        save_checkpoint(everything(job, optimizer), tmp_path / "x")
        take(job, phase, optimizer, 1)

        torch.manual_seed(999)
        again, recipe = world(mode)
        saved = read_checkpoint(tmp_path / "x")
        again.student.net.load_state_dict(saved["s"])
        again.teacher.net.load_state_dict(saved["t"])
        again.kd.load_state_dict(saved["kd"])
        optimizer_again = utils.sgd(again.learners(phase), recipe)
        optimizer_again.load_state_dict(saved["optimizer"])
        take(again, phase, optimizer_again, 1)
        one, two = everything(job, optimizer), everything(again, optimizer_again)
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_moves_in_eval_mode(mode):
    job, batch = toys.job(mode), toys.batch(dtype=torch.float32)
    before = copy.deepcopy(job.kd.state_dict())
    for compare in compares(job.kd[0].row):
        value(job.kd[0].eval(), compare, *features(job, batch), batch)
    torch.testing.assert_close(job.kd.state_dict(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
def test_what_learns_has_a_gradient_and_the_rest_stays(mode):
    for phase in METHODS[mode].phases:
        job, recipe = world(mode)
        learning = job.learners(phase)
        optimizer = utils.sgd(learning, recipe)
        modules = (job.student.net, job.teacher.net, job.kd)
        everyone = [p for module in modules for p in module.parameters()]
        before = [p.detach().clone() for p in everyone]
        take(job, phase, optimizer, 0)
        chosen = {id(p) for p in learning}
        for p, old in zip(everyone, before):
            if id(p) in chosen:
                assert p.grad is not None and p.grad.isfinite().all()
            else:
                assert p.grad is None and torch.equal(p, old)
        assert any(not torch.equal(p, old) for p, old in zip(everyone, before))


@pytest.mark.parametrize("mode", MODES)
def test_exactly_what_learns_is_in_training_mode(mode):
    for phase in METHODS[mode].phases:
        job = toys.job(mode)
        for module in (job.student.net, job.teacher.net, job.kd):
            module.train()
        job.learners(phase)
        roots = dict(student=job.student.net, teacher=job.teacher.net, kd=job.kd)
        for name, root in roots.items():
            for module in root.modules():
                owns = [p for p in module.parameters(recurse=False)]
                assert all(p.requires_grad == module.training for p in owns)
            whole = name in phase.learns
            assert root.training == (
                whole or (name, "backbone" in phase.learns) == ("student", True)
            )
            if whole:
                assert all(module.training for module in root.modules())
        assert job.student.net.fc.training == ("student" in phase.learns)
        assert job.student.net.conv1.training == (
            "student" in phase.learns or "backbone" in phase.learns
        )


# --- 5: no host synchronisation ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "bss"])  # picks its images
def test_no_value_is_read_back(mode):
    """Fake tensors have no values: an .item(), a mask or a branch on data raises."""
    job = toys.job(mode)
    part = job.kd[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in (job.student.net, job.teacher.net, part):
            for name, x in [*module.named_parameters(), *module.named_buffers()]:
                owner, _, leaf = name.rpartition(".")
                table = module.get_submodule(owner)
                x = fake.from_tensor(x)
                (table._parameters if leaf in table._parameters else table._buffers)[leaf] = x
        batch = toys.batch(dtype=torch.float32)
        batch = replace(
            batch, target=torch.empty(8, dtype=torch.int64), index=torch.empty(8).long()
        )
        for compare in compares(part.row):
            loss = part(compare, *features(job, batch), batch)
            if loss.requires_grad:
                loss.backward()


# --- what a protocol changes -----------------------------------------------------------------------

CRD_TABLE = (
    {  # of the CRD benchmark's script: weight, stages, sum or mean; cross-entropy 1 elsewhere
        "st": (0.9, None, "mean"),
        "at": (1000, None, "sum"),
        "fitnet": (100, (2,), "mean"),
        "nst": (50, None, "sum"),
        "pkt": (30000, None, "mean"),
        "fsp": (1, None, "sum"),
        "ft": (200, (-1,), "mean"),
        "rkd": (1, None, "mean"),
        "ab": (0.003, None, "sum"),
        "sp": (3000, (-1,), "mean"),
        "vid": (1, None, "sum"),
        "crd": (0.8, None, "mean"),
        "ofd": (0.001, None, "sum"),  # MDistiller's
    }
)


@pytest.mark.parametrize("mode", CRD_TABLE)
def test_the_crd_benchmark_s_settings(mode):
    row = METHODS[mode].under("crd")
    assert (row.lambda_kd, row.stages, row.reduce) == CRD_TABLE[mode]
    assert row.lambda_ce == (0.1 if mode == "st" else 1.0)
    if len(row.phases) > 1:
        assert row.phases[0].epochs == 30


def test_sums_of_the_crd_benchmark():
    """A sum over a sample's entries, a mean over samples, half the weight a stage further up."""
    from kd_losses import preacts_summed

    job, batch = toys.job("ab"), toys.batch(dtype=torch.float32)
    s, t = features(job, batch)
    found = preacts_summed(job.kd[0].loss, s, t, batch)
    for i, (fm_s, fm_t) in enumerate(zip(s.preacts, t.preacts)):
        sign = torch.where(fm_t > 0, 1.0, -1.0)
        expected = 2.0 ** (i - 2) * (2.0 - sign * fm_s).clamp(min=0).square().sum() / len(fm_s)
        torch.testing.assert_close(found[i], expected)


# --- the table and its files -----------------------------------------------------------------------


def test_one_file_a_row():
    files = {path.stem for path in (ROOT / "kd_losses").glob("*.py")} - {"__init__"}
    assert files == set(METHODS)


def test_rows_are_whole():
    for mode, row in METHODS.items():
        assert row.needs in ("", "size", "channels+size") and row.reduce in ("mean", "sum")
        assert row.teacher in ("frozen", "grad", "trained") and all(row.compare.wants)
        for flag in row.flags:
            assert flag in FLAG_HELP or f"{mode}.{flag}" in FLAG_HELP, (mode, flag)
        assert set(row.protocols) <= set(published.PROTOCOLS)
        for protocol in published.PROTOCOLS:
            row.under(protocol)  # its changes are fields of the row
        assert all(isinstance(phase, Phase) for phase in row.phases)
        assert row.phases[-1].epochs is None, "the last phase is --epochs long"


def test_loss_files_import_torch_alone():
    allowed = {"torch", "math", "collections", "typing"}
    for path in (ROOT / "kd_losses").glob("[!_]*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module.split(".")[0] in allowed, path


@pytest.mark.parametrize("name", ["_float32", "_unit"])
def test_a_helper_that_every_loss_file_has_for_itself_reads_the_same(name):
    """Comments included; and nothing is promoted beside it."""
    found = {}
    for path in (ROOT / "kd_losses").glob("[!_]*.py"):
        text = path.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                found.setdefault(ast.get_source_segment(text, node), []).append(path.name)
        assert text.count("torch.promote_types(") == ("def _float32(" in text), path
    assert len(found) == 1, found
    (files,) = found.values()
    assert len(files) >= dict(_float32=47, _unit=8)[name]


ALONE = {  # how a reader would call the class of a copied file
    "logits": "Logits()(out(), out())",
    "st": "SoftTarget(T=4)(out(), out())",
    "at": "AT(p=2)(fm(), fm())",
    "fitnet": "Hint()(fm(), fm())",
    "nst": "NST()(fm(), fm())",
    "pkt": "PKTCosSim()(feat(), feat())",
    "ft": "FT()(Translator(4, 4, 0.5, True)(fm()), Paraphraser(4, 0.5, True)(fm())[0])",
    "rkd": "RKD(w_dist=25, w_angle=50)(feat(), feat())",
    "ab": "AB(margin=2.0)(fm(), fm())",
    "sp": "SP()(fm(), fm())",
    "bss": "BSS(T=3)(net(BSSAttacker().attack(net, img, target, (target + 1) % 3)), out())",
    "cc": "CC(gamma=0.4, P_order=2)(feat(), feat())",
    "lwm": "(lambda f: LwM()(head(f), f, head(2 * f), f, target))(fm())",
    "irg": "IRG()([fm(), fm(), feat(), out()], [fm(), fm(), feat(), out()])",
    "ofd": "OFD(4, 4)(fm(), fm())",
    "afd": "AFD(4, 1.0)(fm(), fm())",
    "kdsvd": "KDSVD(k=1)([fm(), fm()], [fm(), fm()])",
    "reviewkd": "ReviewKD([4, 6], [4, 6], 8)([fm(), feat()], [fm(), feat()])",
    "dkd": "DKD(alpha=1, beta=8, T=4)(out(), out(), target)",
    "vid": "VID(4, 4, 4, init_var=5.0)(fm(), fm())",
    "fsp": "FSP()(fm(), fm(), fm(), fm())",
    "sobolev": "Sobolev()(net(img), net(img), img, target)",
    "crd": "CRD(6, 6, feat_dim=8, nce_n=4, n_data=9, labels=torch.arange(9) % 3)(feat(), feat(), torch.arange(5))",
    "dml": "DML()(out(), out())",
    "lskd": "LSKD(T=2)(out(), out())",
    "dist": "DIST(T=4)(out(), out())",
    "nkd": "NKD(gamma=1.5, T=1)(out(), out(), target)",
    "ttm": "TTM(gamma=0.1)(out(), out())",
    "wttm": "WTTM(gamma=0.1)(out(), out())",
    "rld": "RLD(alpha=1, beta=8, T=4)(out(), out(), target)",
    "ctkd": "CTKD()(out(), out(), epoch=3)",
    "wsld": "WSLD(alpha=2.25, T=4)(out(), out(), target)",
    "srrl": "SRRL(4, 6)(fm(), feat(), out(), torch.nn.Linear(6, 3))",
    "simkd": "SimKD(4, 4)(fm(), fm())",
    "itrd": "ITRD(6, 6)(feat(), feat())",
    "pefd": "PEFD(6, 6)(feat(), feat())",
    "vkd": "VKD(6, 6)(feat(), feat())",
    "ickd": "ICKD(4, 4)(fm(), fm())",
    "catkd": "CATKD(resolution=2)(fm(), g(3, 4), fm(), g(3, 4))",
    "mlkd": "MLKD()(out(), out(), out(), out())",
    "wkd_l": "WKDL(cka_cost(torch.randn(3, 7, 4)))(out(), out(), target)",
    "wkd_f": "WKDF((4, 6, 6), (4, 6, 6))(fm(), fm())",
    "sdd": "SDD()(fm(), torch.nn.Linear(4, 3), fm(), torch.nn.Linear(4, 3), target)",
    "mgd": "MGD(4, 4)(fm(), fm())",
    "crld": "CRLD(tau_w=0)(out(), out(), out(), out())",
    "semckd": "SemCKD([4, 4], [4, 4], batch=5)([fm(), fm()], [fm(), fm()])",
    "ofa": "OFA([(4, 6, 6)], 4, 3)([fm()], out(), out(), target)",
}

SCRIPT = """
import runpy, sys, torch
for name in ("numpy", "torchvision", "sklearn", "matplotlib", "tqdm"):
    sys.modules[name] = None
g = lambda *shape: torch.randn(*shape, requires_grad=True)
fm, feat, out = lambda: g(5, 4, 6, 6), lambda: g(5, 6), lambda: g(5, 3)
img, target = g(5, 3, 6, 6), torch.arange(5) % 3
head = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(64, 3))
net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(64, 3))
for path, call in zip(sys.argv[1::2], sys.argv[2::2]):
    names = {**globals(), **runpy.run_path(path)}
    for active in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=active):
            loss = eval(call, names)
        assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad and loss.isfinite(), path
        loss.backward()
    print("ran", path)
"""


def test_each_file_runs_alone(tmp_path):
    """Copied into an empty folder, with torch and nothing else, also under autocast."""
    assert set(ALONE) == set(METHODS)
    arguments = []
    for mode, call in ALONE.items():
        folder = tmp_path / mode
        folder.mkdir()
        (folder / f"{mode}.py").write_text((ROOT / "kd_losses" / f"{mode}.py").read_text())
        arguments += [str(folder / f"{mode}.py"), call]
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ran") == len(METHODS)

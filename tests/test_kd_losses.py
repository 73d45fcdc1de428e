"""What every row of the table of methods promises: numbers, degenerate inputs, state,
independence."""

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
from engine.settings import settings
from kd_losses import METHODS, Phase

ROOT = Path(__file__).parent.parent
MODES = list(METHODS)
FLOAT32 = utils.Precision()


def each(features, f):
    """`features` with f applied to every tensor in them."""
    one = {k: getattr(features, k) for k in ("stem", "last", "feat")}
    one = {k: x if x is None else f(x) for k, x in one.items()}
    maps = dict(stages=[f(x) for x in features.stages], preacts=[f(x) for x in features.preacts])
    strong = features.strong and each(features.strong, f)
    return replace(features, out=f(features.out), strong=strong, **one, **maps)


def all_inputs(settings):
    """What the method is fed, and what in its phases."""
    return [settings.inputs, *(phase.inputs for phase in settings.phases if phase.inputs)]


def features(distiller, batch, grad=True):
    """Features of both networks, with the graph down to the image."""
    batch.img.requires_grad_(grad)
    if distiller.two_views:
        batch.strong = batch.img + 0.1
    return batch.features(distiller.student), batch.features(distiller.teacher)


def inside_graph(settings):
    return settings.method.teacher == "grad" and "stages" in settings.inputs.reads


def changed(distiller, batch, change_s, change_t):
    """Features of both networks, every tensor changed. A loss that differentiates in the maps gets
    them changed inside the networks: the logits hang on what it sees."""
    inside = inside_graph(distiller.added[0].settings)
    if inside:
        for net, change in ((distiller.student.net, change_s), (distiller.teacher.net, change_t)):
            for i in distiller.added[0].settings.stages:
                net.get_submodule(net.taps["stages"][i]).f = change
    s, t = features(distiller, batch)
    if inside:
        return replace(s, out=change_s(s.out)), replace(t, out=change_t(t.out))
    return each(s, change_s), each(t, change_t)


def value(part, inputs, s, t, batch):
    torch.manual_seed(1)  # of what a loss draws
    return part(s, t, batch, inputs)


def double(distiller):
    for module in (distiller.student.net, distiller.teacher.net, distiller.added):
        module.double()
    return distiller


# --- 1 and 2: precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_float64_stays_float64(mode):
    distiller, batch = double(toys.distiller(mode)), toys.batch()
    s, t = features(distiller, batch)
    for inputs in all_inputs(distiller.added[0].settings):
        loss = value(distiller.added[0], inputs, s, t, batch)
        assert loss.dtype == torch.float64 and loss.shape == () and loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_right_under_autocast(mode, dtype):
    """Half-precision channels_last inputs under an active autocast, against float64."""
    distiller, batch = toys.distiller(mode), toys.batch()
    part = distiller.added[0].eval()
    exact = copy.deepcopy(part).double()
    for net in (distiller.student.net, distiller.teacher.net):
        net.double()

    def half(x):
        x = x.to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    s, t = changed(distiller, batch, half, half)
    for inputs in all_inputs(part.settings):
        s64, t64 = (
            # maps inside a graph stay as they are: the loss promotes them to float32
            x if inside_graph(part.settings) else each(x, torch.Tensor.double)
            for x in (s, t)
        )
        expected = value(exact, inputs, s64, t64, batch).item()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = value(part, inputs, s, t, batch)
        assert loss.dtype in (torch.float32, torch.float64)
        assert loss.item() == pytest.approx(expected, rel=1e-2, abs=1e-9)
        # and without autocast, the inputs alone being half
        assert value(part, inputs, s, t, batch).item() == pytest.approx(
            expected, rel=1e-2, abs=1e-9
        )


# --- 3: degenerate inputs -------------------------------------------------------------------------


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


def finite(distiller, loss):
    params = [*distiller.student.net.parameters(), *distiller.added.parameters()]
    params = [p for p in params if p.requires_grad]
    grads = torch.autograd.grad(loss, params, allow_unused=True) if loss.requires_grad else []
    return loss.isfinite() and all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("mode", MODES)
def test_degenerate_features(mode, kind):
    distiller, batch = toys.distiller(mode), toys.batch(dtype=torch.float32)
    change_s, change_t = DEGENERATE[kind]
    for inputs in all_inputs(distiller.added[0].settings):
        loss = value(
            distiller.added[0], inputs, *changed(distiller, batch, change_s, change_t), batch
        )
        assert finite(distiller, loss)


@pytest.mark.parametrize("mode", MODES)
def test_student_equal_to_teacher(mode):
    distiller, batch = toys.distiller(mode), toys.batch(dtype=torch.float32)
    # all but a classifier that one of them may not have
    distiller.teacher.net.load_state_dict(distiller.student.net.state_dict(), strict=False)
    for inputs in all_inputs(distiller.added[0].settings):
        assert finite(
            distiller, value(distiller.added[0], inputs, *features(distiller, batch), batch)
        )


@pytest.mark.parametrize("mode", MODES)
def test_all_targets_equal_and_two_classes(mode):
    distiller = toys.distiller(
        mode, toys.Toy(num_class=2), toys.Toy(num_class=2), toys.images(num_class=2)
    )
    batch = toys.batch(num_class=2, dtype=torch.float32)
    batch.target.zero_()
    for inputs in all_inputs(distiller.added[0].settings):
        assert finite(
            distiller, value(distiller.added[0], inputs, *features(distiller, batch), batch)
        )


@pytest.mark.parametrize("mode", MODES)
def test_logits_200_apart(mode):
    distiller, batch = toys.distiller(mode), toys.batch(dtype=torch.float32)
    for inputs in all_inputs(distiller.added[0].settings):
        s, t = features(distiller, batch)
        first = torch.eye(s.out.shape[1])[0], torch.eye(5)[0]
        s, t = replace(s, out=s.out + 200 * first[0]), replace(t, out=t.out - 200 * first[1])
        assert finite(distiller, value(distiller.added[0], inputs, s, t, batch))


@pytest.mark.parametrize("mode", MODES)
def test_maps_of_one_pixel(mode):
    distiller = toys.distiller(mode, toys.Toy(last=1), toys.Toy(last=1))
    batch = toys.batch(dtype=torch.float32)
    for inputs in all_inputs(distiller.added[0].settings):
        assert finite(
            distiller, value(distiller.added[0], inputs, *features(distiller, batch), batch)
        )


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_one(mode):
    """Finite, or one clear ValueError."""
    distiller, batch = toys.distiller(mode), toys.batch(n=1, dtype=torch.float32)
    for inputs in all_inputs(distiller.added[0].settings):
        try:
            loss = value(distiller.added[0].train(), inputs, *features(distiller, batch), batch)
        except ValueError as error:
            assert "two" in str(error) and mode in NOT_ON_ONE
        else:
            assert finite(distiller, loss) and mode not in NOT_ON_ONE


# defined on pairs of samples, or with a batch norm that would see a single value
NOT_ON_ONE = ("rkd", "irg", "reviewkd", "dist", "itrd")


# --- 4: state -------------------------------------------------------------------------------------


def world(mode):
    distiller = toys.distiller(mode, toys.Toy((3, 4, 6, 8)), toys.Toy((4, 4, 8, 8)))
    recipe = Namespace(lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=1)
    return distiller, recipe


def take(distiller, phase, optimizer, n):
    """Step number n."""
    torch.manual_seed(100 + n)
    batch = toys.batch(dtype=torch.float32, strong=distiller.two_views)
    batch.index += n
    train_kd.train_step(
        distiller, phase, optimizer, batch, toys.weights(distiller, 1.0, phase), FLOAT32
    )


def everything(distiller, optimizer):
    nets = dict(s=distiller.student.net, t=distiller.teacher.net, kd=distiller.added)
    return {
        **{name: net.state_dict() for name, net in nets.items()},
        "optimizer": optimizer.state_dict(),
    }


@pytest.mark.parametrize("mode", MODES)
def test_save_and_load_between_two_steps(mode, tmp_path):
    for i, phase in enumerate(METHODS[mode].phases):
        torch.manual_seed(0)
        distiller, recipe = world(mode)
        optimizer = utils.sgd(distiller.set_trainable(phase), recipe)
        take(distiller, phase, optimizer, 0)
        save_checkpoint(everything(distiller, optimizer), tmp_path / "x")
        take(distiller, phase, optimizer, 1)

        torch.manual_seed(999)
        again, recipe = world(mode)
        saved = read_checkpoint(tmp_path / "x")
        again.student.net.load_state_dict(saved["s"])
        again.teacher.net.load_state_dict(saved["t"])
        again.added.load_state_dict(saved["kd"])
        optimizer_again = utils.sgd(again.set_trainable(phase), recipe)
        optimizer_again.load_state_dict(saved["optimizer"])
        take(again, phase, optimizer_again, 1)
        one, two = everything(distiller, optimizer), everything(again, optimizer_again)
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_moves_in_eval_mode(mode):
    distiller, batch = toys.distiller(mode), toys.batch(dtype=torch.float32)
    before = copy.deepcopy(distiller.added.state_dict())
    for inputs in all_inputs(distiller.added[0].settings):
        value(distiller.added[0].eval(), inputs, *features(distiller, batch), batch)
    torch.testing.assert_close(distiller.added.state_dict(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", MODES)
def test_what_learns_has_a_gradient_and_the_rest_stays(mode):
    for phase in METHODS[mode].phases:
        distiller, recipe = world(mode)
        learning = distiller.set_trainable(phase)
        optimizer = utils.sgd(learning, recipe)
        modules = (distiller.student.net, distiller.teacher.net, distiller.added)
        everyone = [p for module in modules for p in module.parameters()]
        before = [p.detach().clone() for p in everyone]
        take(distiller, phase, optimizer, 0)
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
        distiller = toys.distiller(mode)
        for module in (distiller.student.net, distiller.teacher.net, distiller.added):
            module.train()
        distiller.set_trainable(phase)
        roots = dict(
            student=distiller.student.net, teacher=distiller.teacher.net, kd=distiller.added
        )
        for name, root in roots.items():
            for module in root.modules():
                owns = [p for p in module.parameters(recurse=False)]
                assert all(p.requires_grad == module.training for p in owns)
            whole = name in phase.trainable
            assert root.training == (
                whole or (name, "backbone" in phase.trainable) == ("student", True)
            )
            if whole:
                assert all(module.training for module in root.modules())
        assert distiller.student.net.fc.training == ("student" in phase.trainable)
        assert distiller.student.net.conv1.training == (
            "student" in phase.trainable or "backbone" in phase.trainable
        )


# --- 5: no host synchronisation -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "bss"])  # picks its images
def test_no_value_is_read_back(mode):
    """Fake tensors have no values: an .item(), a mask or a branch on data raises."""
    distiller = toys.distiller(mode)
    part = distiller.added[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in (distiller.student.net, distiller.teacher.net, part):
            for name, x in [*module.named_parameters(), *module.named_buffers()]:
                owner, _, leaf = name.rpartition(".")
                table = module.get_submodule(owner)
                x = fake.from_tensor(x)
                (table._parameters if leaf in table._parameters else table._buffers)[leaf] = x
        batch = toys.batch(dtype=torch.float32)
        batch = replace(
            batch, target=torch.empty(8, dtype=torch.int64), index=torch.empty(8).long()
        )
        for inputs in all_inputs(part.settings):
            loss = part(*features(distiller, batch), batch, inputs)
            if loss.requires_grad:
                loss.backward()


# --- what a protocol changes ----------------------------------------------------------------------

CRD_TABLE = {  # of the CRD benchmark's script: weight, stages, sum or mean; CE 1 elsewhere
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


@pytest.mark.parametrize("mode", CRD_TABLE)
def test_the_crd_benchmark_s_settings(mode):
    row = settings(mode, "crd", "", "", 100)
    assert (row.lambda_kd, row.stages, row.reduce) == CRD_TABLE[mode]
    assert row.lambda_ce == (0.1 if mode == "st" else 1.0)
    if len(row.phases) > 1:
        assert row.phases[0].epochs == 30


def test_sums_of_the_crd_benchmark():
    """A sum over a sample's entries, a mean over samples, half the weight a stage further up."""
    from kd_losses import preacts_summed

    distiller, batch = toys.distiller("ab"), toys.batch(dtype=torch.float32)
    s, t = features(distiller, batch)
    found = preacts_summed.feed(distiller.added[0].loss, s, t, batch)
    for i, (fm_s, fm_t) in enumerate(zip(s.preacts, t.preacts)):
        sign = torch.where(fm_t > 0, 1.0, -1.0)
        expected = 2.0 ** (i - 2) * (2.0 - sign * fm_s).clamp(min=0).square().sum() / len(fm_s)
        torch.testing.assert_close(found[i], expected)


# --- the table and its files ----------------------------------------------------------------------


def test_one_file_a_row():
    files = {path.stem for path in (ROOT / "kd_losses").glob("*.py")} - {"__init__", "_wiring"}
    assert files == set(METHODS)


def test_rows_are_whole():
    for mode, method in METHODS.items():
        assert method.match in ("", "size", "channels+size") and method.reduce in ("mean", "sum")
        assert method.teacher in ("frozen", "grad", "trained") and method.inputs.reads
        for name, flag in method.flags.items():
            assert flag.help and flag.kind in (float, int, bool, str), (mode, name)
            assert isinstance(flag.default, flag.kind), (mode, name)
            assert not flag.choices or flag.default in flag.choices
            assert flag.only is None or flag.only[1] in method.flags[flag.only[0]].choices
        for protocol in published.PROTOCOLS:
            settings(mode, protocol, "", "", 10)  # its changes are settings of the method
        assert all(isinstance(phase, Phase) for phase in method.phases)
        assert method.phases[-1].epochs is None, "the last phase is --epochs long"


def test_published_settings_are_of_methods_and_their_fields():
    for protocol, by_mode in published.SETTINGS.items():
        assert protocol in published.PROTOCOLS
        for mode, fields in by_mode.items():
            own = {"pairs", "batch_size", "teacher_bn", "taps", "adapter", *METHODS[mode].flags}
            own |= {"lambda_kd", "lambda_ce", "stages", "reduce", "inputs", "ramp", "phases"}
            for names in (fields, *fields.get("pairs", {}).values()):
                assert set(names) <= own, (protocol, mode, set(names) - own)


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
    """With its comments; and nothing else is promoted."""
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
    "crd": "CRD(6, 6, feat_dim=8, nce_n=4, n_data=9, labels=torch.arange(9) % 3)"
    "(feat(), feat(), torch.arange(5))",
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
from torch.nn import Conv2d, Flatten, Linear, Sequential, Tanh
head = Sequential(Conv2d(4, 4, 3), Tanh(), Flatten(), Linear(64, 3))
net = Sequential(Conv2d(3, 4, 3), Tanh(), Flatten(), Linear(64, 3))
for path, call in zip(sys.argv[1::2], sys.argv[2::2]):
    names = {**globals(), **runpy.run_path(path)}
    for active in (False, True) if call else ():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=active):
            loss = eval(call, names)
        assert loss.shape == () and loss.dtype == torch.float32, path
        assert loss.requires_grad and loss.isfinite(), path
        loss.backward()
    print("ran", path)
"""


def test_each_file_runs_alone(tmp_path):
    """Copied into an empty folder, with torch and nothing else, also under autocast; a file without
    a call above is imported."""
    assert set(ALONE) <= set(METHODS)
    arguments = []
    for mode in METHODS:
        call = ALONE.get(mode, "")
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

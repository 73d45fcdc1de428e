"""Which class an output stands for: names in another order, other names, more classes, and none."""

import json

import pytest
import torch
import torchvision
from conftest import tiers
from messages import ends, names, refused
from mistakes import pictures
from torch import nn

import network
import toys
import train_base
import train_kd
from engine import foreign
from engine.checkpoint import Weights, find_weights, read_checkpoint
from engine.outputs import forward_logits, match_classes, select_outputs
from engine.pair import needed_classes
from kd_losses import METHODS
from tools import eval as evaluation
from tools import export

ANIMALS = ["cat", "dog", "eel", "fox"]
MOVED = ["fox", "cat", "eel", "dog"]  # the same, in the order of some other file
QUICK = ["--cuda", "0", "--amp", "off", "--epochs", "1", "--batch_size", "16", "--img_size", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("img") / "animals", 12, ANIMALS, 8)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The checkpoints of two networks, trained for two epochs on the folder."""
    root = tmp_path_factory.mktemp("trained")
    files = {}
    for name in ("resnet14", "resnet8"):
        argv = ["--net_name", name, *images(folder), *QUICK, "--epochs", "2", "--note", name]
        files[name] = train_base.main([*argv, "--save_root", str(root)])["dir"]
    return {name: f"{x}/checkpoint.pth.tar" for name, x in files.items()}


def images(folder):
    return ["--data_name", "imagefolder", "--img_root", str(folder)]


def permuted(file, out, classes=MOVED):
    """The same network with its classes in another order: the rows of its classifier, and their
    names."""
    saved = read_checkpoint(file)
    index = [saved["meta"]["classes"].index(name) for name in classes]
    for key in ("fc.weight", "fc.bias"):
        saved["net"][key] = saved["net"][key][index]
    saved["meta"]["classes"] = list(classes)
    torch.save(dict(net=saved["net"], meta=saved["meta"]), out)
    return str(out)


def renamed(file, out, **meta):
    saved = read_checkpoint(file)
    known = {k: v for k, v in (saved["meta"] | meta).items() if v is not None}
    torch.save(dict(net=saved["net"], meta=known), out)
    return str(out)


@pytest.fixture
def distil(folder, tmp_path, capsys):
    """A function: (mode, teacher, flags) -> (the log, metrics.csv without a header)."""

    def run(mode, teacher, *argv, student=("--s_name", "resnet8"), note="run"):
        files = ["--t_model", teacher, *student, "--save_root", str(tmp_path / "runs")]
        argv = ["--kd_mode", mode, *files, *toys.small_flags(mode), *QUICK, "--note", note, *argv]
        capsys.readouterr()
        train_kd.main([str(x) for x in argv])
        return capsys.readouterr().out, (tmp_path / "runs" / note / "metrics.csv").read_text()

    return run


def score(text):
    """The teacher's accuracy in a log."""
    return next(x.split()[-1] for x in text.splitlines() if "teacher test_top1" in x)


# --- the same names in another order --------------------------------------------------------------


@pytest.mark.parametrize("mode", tiers(["st", "simkd", "catkd", "srrl"], "st", "simkd"))
def test_another_order_teaches_the_same(trained, distil, tmp_path, mode):
    """Accuracy, losses and the trained student are those of the unpermuted run, bit for bit."""
    plain, metrics = distil(mode, trained["resnet14"], note="plain")
    file = permuted(trained["resnet14"], tmp_path / "moved.pth")
    mapped, same = distil(mode, file, note="mapped")
    assert score(plain) == score(mapped) and metrics == same
    said = [line for line in mapped.splitlines() if "another order" in line]
    assert len(said) == 1 and names(said[0], file, "imagefolder") and "another order" not in plain
    runs = (tmp_path / "runs" / x / "checkpoint.pth.tar" for x in ("plain", "mapped"))
    one, two = map(read_checkpoint, runs)
    torch.testing.assert_close(one["snet"], two["snet"], rtol=0, atol=0)
    assert one["meta"]["classes"] == two["meta"]["classes"] == ANIMALS
    args = json.loads((tmp_path / "runs/mapped/args.json").read_text())
    assert args["teacher"]["outputs"] == [1, 3, 2, 0]


def test_another_order_of_the_student(trained, distil, tmp_path):
    """A student continues from its weights in the dataset's order, and is saved in it."""
    start = ("--s_init", trained["resnet8"])
    _, metrics = distil("at", trained["resnet14"], student=start, note="plain")
    start = ("--s_init", permuted(trained["resnet8"], tmp_path / "moved.pth"))
    mapped, same = distil("at", trained["resnet14"], student=start, note="mapped")
    assert metrics == same and "another order" in mapped


@pytest.mark.slow
def test_another_order_in_eval(trained, tmp_path, capsys):
    file = permuted(trained["resnet14"], tmp_path / "moved.pth")
    found = {}
    for name, argv in dict(
        plain=[trained["resnet14"], "--teacher", trained["resnet8"]],
        mapped=[file, "--teacher", permuted(trained["resnet8"], tmp_path / "other.pth")],
    ).items():
        found[name] = evaluation.main([*argv, "--cuda", "0", "--amp", "off"])
    err = capsys.readouterr().err
    assert names(err, file) and err.count("another order") == 2
    keys = ("top1", "top5", "loss", "agreement", "teacher_top1", "kl")
    assert [found["plain"][k] for k in keys] == [found["mapped"][k] for k in keys]


def test_export_keeps_the_order_of_the_file(trained, tmp_path):
    pytest.importorskip("safetensors")
    file = permuted(trained["resnet14"], tmp_path / "moved.pth")
    export.main([file, "--out", str(tmp_path / "x.safetensors")])
    assert read_checkpoint(tmp_path / "x.safetensors")["meta"]["classes"] == MOVED


def test_files_that_know_no_names(trained, distil, tmp_path):
    """Older ones, and other people's, load as before."""
    plain, metrics = distil("st", trained["resnet14"], note="plain")
    file = renamed(trained["resnet14"], tmp_path / "old.pth", classes=None)
    old, same = distil("st", file, note="old")
    assert metrics == same and "another order" not in old


# --- other names ----------------------------------------------------------------------------------

WOLVES = ["bat", "cow", "eel", "fox"]


def test_other_names(trained, distil, tmp_path, capsys):
    file = renamed(trained["resnet14"], tmp_path / "wolves.pth", classes=WOLVES)
    with ends(capsys, "--t_model", file, "bat", "cat", "--t_classes", "--kd_mode st", "at"):
        distil("st", file)
    with ends(capsys, "--s_init", file, "bat", "cat"):
        distil("at", trained["resnet8"], student=("--s_init", file))
    with ends(capsys, file, "bat", "cat", "--classes"):
        evaluation.main([file, "--cuda", "0"])
    with ends(capsys, file, "bat", "cat", "--t_classes"):
        evaluation.main([trained["resnet8"], "--teacher", file, "--cuda", "0"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("written", tiers(["name", "index", "mixed"], "mixed"))
def test_t_classes_is_the_way_out(trained, distil, tmp_path, written):
    """Wolves are mapped to cats: an order of the teacher's own classes."""
    plain, metrics = distil("st", trained["resnet14"], note="plain")
    moved = permuted(trained["resnet14"], tmp_path / "moved.pth")
    other = dict(zip(ANIMALS, WOLVES))
    file = renamed(moved, tmp_path / "wolves.pth", classes=[other[x] for x in MOVED])
    index = [str(MOVED.index(x)) for x in ANIMALS]
    lines = dict(name=WOLVES, index=index, mixed=WOLVES[:2] + index[2:])[written]
    (tmp_path / "classes.txt").write_text("\n".join(lines) + "\n")
    mapped, same = distil("st", file, "--t_classes", tmp_path / "classes.txt", note="mapped")
    assert metrics == same and score(plain) == score(mapped)
    assert names(mapped, "--t_classes", "imagefolder")
    argv = [file, "--classes", str(tmp_path / "classes.txt"), "--cuda", "0", "--amp", "off"]
    top1 = evaluation.main([trained["resnet14"], "--cuda", "0", "--amp", "off"])["top1"]
    assert evaluation.main(argv)["top1"] == top1


# --- more classes ---------------------------------------------------------------------------------

LARGE = ["ant", *ANIMALS, "gnu", "hen"]  # of 7 classes


@pytest.fixture
def large(trained, tmp_path):
    """The teacher with three classes more, whose other logits are the teacher's."""
    saved = read_checkpoint(trained["resnet14"])
    weight, bias = saved["net"]["fc.weight"], saved["net"]["fc.bias"]
    torch.manual_seed(1)
    more = torch.randn(3, weight.shape[1])
    saved["net"]["fc.weight"] = torch.cat([more[:1], weight, more[1:]])
    saved["net"]["fc.bias"] = torch.cat([bias[:1], bias, bias[:2]])
    saved["meta"] |= dict(num_class=7, classes=LARGE)
    torch.save(dict(net=saved["net"], meta=saved["meta"]), tmp_path / "large.pth")
    return str(tmp_path / "large.pth")


def test_a_teacher_of_more_classes_teaches_features(large, distil, tmp_path):
    out, _ = distil("at", large)
    assert "teacher test_top1" not in out and "no better than chance" not in out
    assert any(names(line, large, "7", "4") for line in out.splitlines())
    student = read_checkpoint(tmp_path / "runs/run/checkpoint.pth.tar")
    assert student["snet"]["fc.bias"].shape == (4,) and student["meta"]["num_class"] == 4


@pytest.mark.parametrize("mode", ["st", "dkd", "simkd", "catkd", "srrl", "sdd", "st+at", "dml"])
def test_a_teacher_of_more_classes_teaches_no_logits(large, distil, tmp_path, capsys, mode):
    own = "st" if mode == "st+at" else mode
    with ends(capsys, "--t_model", large, "7", "4", "--t_classes", own, "fitnet", "more"):
        distil(mode, large)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("mode", tiers(["st", "simkd", "sdd"], "st"))
def test_its_logits_are_selected(trained, large, distil, tmp_path, mode):
    """As if it had never had the others."""
    plain, metrics = distil(mode, trained["resnet14"], note="plain")
    (tmp_path / "classes.txt").write_text("\n".join(ANIMALS))
    mapped, same = distil(mode, large, "--t_classes", tmp_path / "classes.txt", note="mapped")
    assert metrics == same and score(plain) == score(mapped)


def test_other_data_for_features(trained, tmp_path, folder, capsys):
    """A teacher of the digits on the folder: the flags say which images."""
    digits = renamed(trained["resnet14"], tmp_path / "x.pth", data_name="digits", num_class=None)
    other = renamed(digits, tmp_path / "y.pth", classes=WOLVES, img_root="gone", img_size=9)
    argv = ["--t_model", other, "--s_name", "resnet8", *images(folder), *QUICK]
    argv += ["--save_root", str(tmp_path / "runs"), "--dry_run"]
    train_kd.main(["--kd_mode", "at", *argv])
    assert names(capsys.readouterr().out, "imagefolder", "bat", "cat")
    with ends(capsys, "--data_name", "imagefolder", "digits", other, "--t_classes", "at"):
        train_kd.main(["--kd_mode", "st", *argv])


def test_pretrained_weights_teach_logits_of_their_own_classes_alone(
    tmp_path, folder, monkeypatch, capsys
):
    """A fresh classifier knows nothing; all the others are the library's."""
    name = "squeezenet1_1"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    net = torchvision.models.get_model(name, weights=None)
    torch.save(net.state_dict(), tmp_path / "hub/checkpoints" / weights.url.rpartition("/")[2])
    argv = ["--t_pretrained", "--t_name", f"torchvision/{name}", *images(folder), *QUICK]
    argv += ["--img_size", "32", "--s_name", "resnet8", "--save_root", str(tmp_path / "runs")]
    with ends(capsys, "--t_pretrained", "1000", "4", "--kd_mode st", "--t_classes", "at"):
        train_kd.main(["--kd_mode", "st", *argv])
    train_kd.main(["--kd_mode", "at", *argv])
    assert "teacher test_top1" not in capsys.readouterr().out
    lines = ["tabby", "golden retriever", "390", "red fox"]
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    mapped = ["--t_classes", str(tmp_path / "classes.txt"), "--note", "mapped"]
    train_kd.main(["--kd_mode", "st", *argv, *mapped])
    assert "teacher test_top1" in capsys.readouterr().out
    categories = weights.meta["categories"]
    args = json.loads((tmp_path / "runs/mapped/args.json").read_text())
    want = [categories.index(x) if x != "390" else 390 for x in lines]
    assert args["teacher"]["outputs"] == want


# --- which methods --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", METHODS)
def test_what_a_row_says_it_reads(mode):
    """With a teacher of other classes, the methods that read no answers take a whole step, and the
    same step as with a teacher of the dataset's classes; the others are not among those named."""
    if METHODS[mode].reads_answers:
        assert needed_classes([mode])[0]
        return
    assert needed_classes([mode]) == ("", "")
    found = []
    for num_class in (5, 9):
        torch.manual_seed(3)
        teacher = toys.Toy(num_class=num_class)
        torch.manual_seed(4)
        student, train = toys.Toy(), toys.images()
        distiller = toys.distiller(mode, student, teacher, train)
        batch = toys.batch(dtype=torch.float32)
        for phase in distiller.phases if num_class else ():
            s, t = (batch.features(x) for x in (distiller.student, distiller.teacher))
            for criterion in distiller.added:
                found.append(criterion(s, t, batch, phase.inputs).detach())
    half = len(found) // 2
    torch.testing.assert_close(found[:half], found[half:])


def test_a_good_share_of_the_methods_reads_no_answers():
    free = {mode for mode, method in METHODS.items() if not method.reads_answers}
    assert {"at", "fitnet", "crd", "rkd", "sp", "ofd", "reviewkd", "vid"} <= free
    assert not free & {"st", "dkd", "logits", "bss", "sobolev", "lwm", "irg", "simkd", "catkd"}
    assert not free & {"srrl", "sdd", "ofa", "wkd_l", "dml"}


# --- selecting ------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Its logits are not those of its last layer."""

    def __init__(self, num_class=6):
        super().__init__()
        self.fc = nn.Linear(3, num_class)
        self.scale = nn.Parameter(torch.arange(1.0, num_class + 1))

    def forward(self, img):
        return self.fc(img.mean((2, 3))) * self.scale


@pytest.mark.parametrize("index", [(3, 0, 5), (5, 4, 3, 2, 1, 0)])
@pytest.mark.parametrize("kind", ["ours", "convolution", "scaled"])
def test_selected_logits(index, kind):
    net = {
        "ours": lambda: network.build("resnet8", 6),
        "convolution": lambda: foreign.build("torchvision/squeezenet1_1", 6),
        "scaled": Scaled,
    }[kind]().eval()
    img = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        before, keys = net(img)[:, list(index)], list(net.state_dict())
        drawn = torch.get_rng_state()
        select_outputs(net, "x", index, 6, 32)
        assert torch.equal(drawn, torch.get_rng_state())
        torch.testing.assert_close(net(img), before)
    assert {*net.state_dict()} == {*keys, *["selected_outputs"] * (kind == "scaled")}
    assert bool(net._forward_hooks) == (kind == "scaled")
    assert forward_logits(net, "x", len(index), 32).shape == (2, len(index))
    if kind == "scaled":
        with refused("x", "order"):
            select_outputs(Scaled(), "x", index, 6, 32, in_classifier=True)


@pytest.mark.parametrize(
    "lines, named",
    [
        (["cat", "dog", "eel"], ["3", "4", "digits"]),
        (["cat", "dog", "eel", "wolf"], ["4", "c3", "wolf"]),
        (["cat", "dog", "eel", "eel"], ["4", "c3", "eel"]),
        (["cat", "dog", "2", "eel"], ["4", "c3", "eel"]),
        (["cat", "dog", "eel", "7"], ["4", "c3", "7", "6"]),
        (["cat", "dog", "eel", "-1"], ["4", "c3", "-1"]),
        (["cat", "dog", "eel", "9" * 5000], ["4", "c3", "999*"]),
        (["twin", "dog", "eel", "cat"], ["1", "c0", "twin"]),
    ],
)
def test_wrong_lines(lines, named):
    mine = ["cat", "dog", "eel", "fox", "twin", "twin", "ox"]
    found = Weights("resnet8", {}, dict(num_class=7, classes=mine), "x.pth")
    where = [f"c{i}" for i in range(4)], "digits", 12, "--t_model"
    with refused("--t_classes", *named):
        match_classes(found, *where, tuple(lines), "--t_classes")
    found.meta.pop("classes")
    with refused("--t_classes", 1, "dog"):
        match_classes(found, *where, ("0", "dog", "2", "3")[::-1][2:] * 2, "--t_classes")


def test_names_that_are_numbers():
    """A class's name goes before an index."""
    mine = [str(9 - i) for i in range(10)]
    found = Weights("resnet8", {}, dict(num_class=10, classes=mine), "x.pth")
    outputs = match_classes(
        found, list("abcd"), "x", 12, "--t_model", ("9", "8", "0", "1"), "--t_classes"
    )
    assert outputs.index == (0, 1, 9, 8)


def test_the_number_of_classes_of_an_unknown_file(tmp_path):
    """Of one that does not say it, by its shapes."""
    state = foreign.build("torchvision/squeezenet1_1", 7).state_dict()
    torch.save({f"module.{key}": x for key, x in state.items()}, tmp_path / "x.pth")
    found = find_weights("torchvision/squeezenet1_1", str(tmp_path / "x.pth"), "t_name", "t_model")
    assert found.classes(4, 32) == (7, None)


# --- several students -----------------------------------------------------------------------------


@pytest.mark.slow
def test_students_side_by_side(trained, large, folder, tmp_path, capsys):
    """Each as alone: a teacher in another order for logits and features, one of more classes for
    features alone."""
    argv = ["--s_name", "resnet8", *images(folder), *QUICK]
    argv += ["--save_root", str(tmp_path / "runs")]
    moved = permuted(trained["resnet14"], tmp_path / "moved.pth")
    for note, file in dict(plain=trained["resnet14"], mapped=moved).items():
        train_kd.main(["--kd_mode", "catkd,at,none", "--t_model", file, *argv, "--note", note])
    for mode in ("catkd", "at"):
        rows = [
            (tmp_path / "runs" / f"{mode}-{x}/metrics.csv").read_text() for x in ("plain", "mapped")
        ]
        assert rows[0] == rows[1]
    capsys.readouterr()
    train_kd.main(["--kd_mode", "at,fitnet", "--t_model", large, *argv, "--note", "large"])
    assert "teacher test_top1" not in capsys.readouterr().out
    for modes in ("at,st", "st,at"):
        with ends(capsys, "--t_model", large, "--kd_mode st", "--t_classes"):
            train_kd.main(["--kd_mode", modes, "--t_model", large, *argv, "--note", "no"])

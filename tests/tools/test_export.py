import json
import sys
from pathlib import Path

import pytest
import torch
import mistakes
from mistakes import is_line, missing

import network
import train_kd
import engine.run as run_module
from engine import foreign
from engine.checkpoint import find_weights, read_checkpoint, read_weights, save_checkpoint
from tools import eval as evaluation
from tools import export

KINDS = list(export.SUFFIXES)
META = mistakes.META | dict(img_root="/somewhere/of/mine", std=[0.4] * 3)


def weights(name="resnet8", num_class=10, size=12):
    """The state dict of a network with trained batch norm statistics."""
    net = foreign.build(name, num_class, size).train()
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(8, 3, size, size))
    return net.state_dict()


@pytest.fixture
def student(tmp_path):
    """A distilled student's checkpoint, with a method's state and an adapter in it."""
    state = dict(snet=weights(), meta=META, kd={"0.adapter.layers.stages0.weight": torch.ones(3)})
    save_checkpoint(state, tmp_path / "model_best.pth.tar")
    return tmp_path / "model_best.pth.tar"


def run(path, *argv):
    return export.main([str(path), *map(str, argv)])


def reader(path):
    """(a function from images to logits, the metadata) of a file, read with its own library."""
    if path.suffix == ".onnx":
        import onnx
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        props = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
        return lambda img: torch.tensor(session.run(None, {"img": img.numpy()})[0]), props["meta"]
    if path.suffix == ".pt2":
        extra = dict(meta="")
        return torch.export.load(path, extra_files=extra).module(), extra["meta"]
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
        meta = file.metadata()["meta"]
    net = foreign.build(json.loads(meta)["network"], json.loads(meta)["num_class"]).eval()
    net.load_state_dict(state)
    return net, meta


def assert_same_logits(path, checkpoint, name="resnet8", size=12, batches=(1, 3, 8)):
    net = foreign.build(name, 10, size).eval()
    net.load_state_dict(read_weights(read_checkpoint(checkpoint)))
    other, meta = reader(path)
    for batch in batches:
        img = 2 * torch.randn(batch, 3, size, size)
        with torch.no_grad():
            want, got = net(img), other(img)
        assert got.shape == (batch, 10)
        assert (got - want).abs().max() <= 1e-4 * max(1, want.abs().max())
    return json.loads(meta)


# --- the files ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_checkpoint_s_logits(kind, student, capfd):
    """For several batch sizes. The metadata is that of the checkpoint, without local paths."""
    result = run(student, "--format", kind)
    out = Path(result["path"])
    assert out == student.with_name(f"model_best{export.SUFFIXES[kind]}")
    assert {p.name for p in out.parent.iterdir()} == {student.name, out.name}
    assert assert_same_logits(out, student) == {k: v for k, v in META.items() if k != "img_root"}
    content = out.read_bytes()
    assert b"/somewhere/of/mine" not in content and str(export.ROOT).encode() not in content

    printed, err = capfd.readouterr()  # with the output of the exporters' libraries
    assert err == ""
    first, second, third = printed.splitlines()
    assert missing([str(out), "resnet8", "10", "78,042"], first) == []
    assert missing(["float32", "3, 12, 12", "[0.3, 0.3, 0.3]", "[0.4, 0.4, 0.4]"], second) == []
    assert f"{result['difference']:.1e}" in third and result["difference"] < 1e-5


def test_a_graph_for_one_number_of_images(student):
    out = Path(run(student, "--format", "torch", "--batch", "3")["path"])
    assert_same_logits(out, student, batches=(3,))
    with pytest.raises(Exception, match="3"):
        reader(out)[0](torch.zeros(2, 3, 12, 12))


FOREIGN = ["torchvision/resnet18", "timm/test_resnet", "MobileNetV2", "ShuffleV2"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FOREIGN)
def test_other_networks(name, kind, tmp_path):
    """Activations in place, grouped convolutions and shuffled channels."""
    checkpoint = tmp_path / "net.pth"
    meta = dict(META, network=name, img_size=32)
    torch.save(dict(net=weights(name, size=32), meta=meta), checkpoint)
    out = tmp_path / f"out{export.SUFFIXES[kind]}"
    assert run(checkpoint, "--out", out)["difference"] < 1e-5
    assert assert_same_logits(out, checkpoint, name, 32)["network"] == name


def test_safetensors_is_a_checkpoint_like_any_other(student, tmp_path, monkeypatch):
    """It has only the student; it can be evaluated, exported and used as a teacher."""
    monkeypatch.setattr(evaluation, "SECONDS", 0)
    monkeypatch.setattr(run_module, "draw_curves", lambda *_: None)
    out = tmp_path / "student.safetensors"
    run(student, "--out", out)
    known, saved = read_checkpoint(student)["snet"], read_checkpoint(out)
    assert saved["net"].keys() == known.keys()
    assert all(torch.equal(saved["net"][key], value) for key, value in known.items())
    scores = [evaluation.main([str(p), "--cuda", "0"]) for p in (student, out)]
    for key in ("top1", "loss", "agreement", "mean", "network", "img_size"):
        assert scores[0].get(key) == scores[1].get(key)

    run(out, "--out", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()
    argv = ["--kd_mode", "st", "--t_model", str(out), "--s_name", "resnet8", "--epochs", "1"]
    argv += ["--save_root", str(tmp_path), "--cuda", "0", "--batch_size", "256"]
    folder = Path(train_kd.main(argv)["dir"])
    args = json.loads((folder / "args.json").read_text())
    assert args["teacher"]["path"] == str(out) and args["meta"]["mean"] == META["mean"]
    top1 = scores[1]["top1"]
    assert f"teacher test_top1 {top1:.2f}" in (folder / "log.txt").read_text()


def test_a_public_file_without_metadata(tmp_path, capsys):
    """The network is recognised; the image size is required; mean and std stay unknown."""
    torch.save(dict(model=weights("wrn_16_1")), tmp_path / "wrn.pth")
    out = tmp_path / "wrn.safetensors"
    run(tmp_path / "wrn.pth", "--out", out, "--img_size", "12")
    assert "normalised" in capsys.readouterr().out
    known = dict(network="wrn_16_1", num_class=10, img_size=12)
    assert read_checkpoint(out)["meta"] == known


def test_tied_weights_and_your_own_network(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def tied(num_class):\n"
        "    a, b = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))\n"
        "    b.weight = a.weight\n"
        "    return nn.Sequential(a, b, nn.Flatten(), nn.Linear(192, num_class))\n"
    )
    name = f"{file}:tied"
    torch.save(foreign.build(name, 7).state_dict(), tmp_path / "mine.pth")
    known = ["--net", name, "--num_class", "7", "--img_size", "8"]
    run(tmp_path / "mine.pth", "--format", "safetensors", *known)
    found = find_weights(name, str(tmp_path / "mine.safetensors"), "net", "x")
    assert found.meta["num_class"] == 7


# --- the check ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS[::2], pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_file_that_computes_something_else_is_not_left(kind, student, monkeypatch, capsys):
    """It is removed, and does not replace an existing file."""
    write, read = export.FORMATS[kind]

    def tampered(net, *args):
        net = network.build("resnet8", 10).eval()
        net.load_state_dict(read_weights(read_checkpoint(student)))
        net.fc.bias[3] += 1
        return write(net, *args)

    out = student.with_name("old" + export.SUFFIXES[kind])
    out.write_text("old")
    monkeypatch.setitem(export.FORMATS, kind, (torch.no_grad()(tampered), read))
    with pytest.raises(SystemExit) as stop:
        run(student, "--out", out, "--force")
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert is_line(captured.err) and str(out) in captured.err
    assert out.read_text() == "old" and captured.out == ""
    assert {p.name for p in out.parent.iterdir()} == {student.name, out.name}


@pytest.mark.parametrize("value", [float("nan"), torch.zeros(1, 10)])
def test_nan_or_another_shape_is_a_difference(value, student, monkeypatch, capsys):
    def answer(*_):
        return lambda img: value + (0 if torch.is_tensor(value) else torch.zeros(5, 10))

    monkeypatch.setitem(export.FORMATS, "torch", (lambda *_: b"file", answer))
    with pytest.raises(SystemExit) as stop:
        run(student, "--format", "torch")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and is_line(err) and str(student.with_name("model_best.pt2")) in err
    assert [p.name for p in student.parent.iterdir()] == [student.name]


def test_a_file_is_never_written_over(student, capsys):
    out = student.with_name("x.safetensors")
    out.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        run(student, "--out", out)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and is_line(err) and missing([str(out), "--force"], err) == []
    assert out.read_text() == "mine"
    run(student, "--out", out, "--force")
    assert read_checkpoint(out)["meta"]["network"] == "resnet8"


def test_without_onnxruntime(student, monkeypatch, capsys):
    """The file is written, and a line says that it was not checked."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(export.FORMATS, "onnx", (lambda *_: b"file", export.from_onnx))
    result = run(student, "--format", "onnx")
    assert result["difference"] is None and Path(result["path"]).read_bytes() == b"file"
    assert "pip install onnxruntime" in capsys.readouterr().out


def test_the_longest_name(student):
    out = student.with_name("x" * 243 + ".safetensors")
    assert run(student, "--out", out)["path"] == str(out) and out.exists()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, module", [("safetensors", "safetensors"), ("onnx", "onnxscript")])
def test_a_missing_library_is_one_line(kind, module, student, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stop:
        run(student, "--format", kind)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and is_line(err) and f"pip install {module}" in err


LONG = "x" * 300
SHOWN = "x" * 40 + "*"  # the part of it that a message must show
LOOP = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, num_class):
        super().__init__()
        self.fc = nn.Linear(192, num_class)
    def forward(self, img):
        return self.fc(torch.stack([x.flatten() for x in img]))
"""


LOOP_FILE = ["{tmp}/loop.pth", "--format", "torch"]


@pytest.mark.parametrize(
    "argv, names",
    [
        ([], ["CHECKPOINT"]),
        (["{file}"], ["--format", "--out"]),
        (["{tmp}/none.pth", "--format", "torch"], ["{tmp}/none.pth"]),
        (["{tmp}/broken.pth", "--format", "torch"], ["{tmp}/broken.pth"]),
        (["{file}", "--format", "tflite"], ["--format", "tflite"]),
        (["{file}", "--out", "{tmp}/x.bin"], ["--out", "{tmp}/x.bin"]),
        (["{file}", "--format", "onnx", "--out", "{tmp}/x.pt2"], ["--out", "{tmp}/x.pt2", ".onnx"]),
        (["{file}", "--out", "{tmp}/no/x.pt2"], ["{tmp}/no/x.pt2"]),
        (["{file}", "--out", f"{{tmp}}/{LONG}.pt2"], ["{tmp}/" + SHOWN]),
        (["{file}", "--out", f"{{tmp}}/{LONG}/x.pt2"], ["{tmp}/" + SHOWN]),
        (["{file}", "--out", "a\0b.pt2"], ["--out"]),
        (["{file}", "--out", ""], ["--out"]),
        (["{file}", "--format", "torch", "--net", "a\0b"], ["--net"]),
        ([f"{LONG}.pth", "--format", "torch"], [SHOWN]),
        (["a\0b.pth", "--format", "torch"], ["CHECKPOINT"]),
        (["", "--format", "torch"], ["CHECKPOINT"]),
        ([".", "--format", "torch"], ["."]),
        (["/", "--format", "torch"], ["/"]),
        (["{file}", "--out", "{tmp}/x.pt2", "--img_size", "16"], ["--img_size", "16"]),
        (["{file}", "--out", "{tmp}/x.pt2", "--num_class", "7"], ["--num_class", "7"]),
        (["{file}", "--out", "{tmp}/x.pt2", "--net", "resnet20"], ["--net", "resnet20"]),
        (["{file}", "--out", "{tmp}/x.safetensors", "--batch", "2"], ["--batch"]),
        (["{file}", "--format", "torch", "--batch", "0"], ["--batch"]),
        (["{file}", "--format", "torch", "--epochs", "1"], ["--epochs"]),
        (["{tmp}/raw.pth", "--format", "torch"], ["--img_size"]),
        (LOOP_FILE, ["{tmp}/loop.pth", "--net"]),
        ([*LOOP_FILE, "--net", "{net}"], ["--num_class"]),
        ([*LOOP_FILE, "--net", "{net}", "--num_class", "7", "--img_size", "8"], ["--batch"]),
        (
            [*LOOP_FILE, "--net", "{net}", "--num_class", "7", "--img_size", "9"],
            ["{net}", "--img_size"],
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(student, tmp_path, capfd, argv, names):
    (tmp_path / "broken.pth").write_bytes(student.read_bytes()[:5000])
    torch.save(dict(model=network.build("resnet8", 10).state_dict()), tmp_path / "raw.pth")
    (tmp_path / "loop.py").write_text(LOOP)
    net = f"{tmp_path}/loop.py:Net"
    torch.save(foreign.build(net, 7).state_dict(), tmp_path / "loop.pth")
    before = sorted(tmp_path.iterdir())
    places = dict(tmp=tmp_path, file=student, net=net)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        export.main([x.format(**places) for x in argv])
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert is_line(err) and out == "", err
    assert missing([x.format(**places) for x in names], err, tmp_path) == [], err
    assert sorted(tmp_path.iterdir()) == before

import csv
import json
from pathlib import Path

import pytest
import torch
from mistakes import is_line, missing

import network
import train_base
import train_kd
import engine.run as run_module
import utils
from engine import foreign, published, stream
from engine.checkpoint import read_checkpoint, read_weights
from engine.run import read_metrics
from tools import eval as tool

SMALL = ["--data_name", "digits", "--img_size", "8", "--cuda", "0"]
FEW = ["--epochs", "1", "--batch_size", "128"]
MINE = """
import torch
from torch import nn

print("importing")

def tiny(num_class):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, num_class)
    )
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(tool, "SECONDS", 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of a network without a teacher, a distilled one, and two of mutual learning."""
    root = tmp_path_factory.mktemp("runs")
    where = [*FEW, "--lr", "0.02", "--save_root", str(root), "--note"]
    kd = ["--t_model", str(root / "base" / "model_best.pth.tar"), "--s_name", "resnet8"]
    dml = ["--t_name", "resnet14", "--s_name", "resnet8", *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "draw_curves", lambda *_: None)  # a second each
        train_base.main(["--net_name", "resnet14", *SMALL, *where, "base"])
        train_kd.main(["--kd_mode", "at", *kd, "--cuda", "0", *where, "at"])
        train_kd.main(["--kd_mode", "dml", *dml, *where, "dml"])
    return root


@pytest.fixture
def mine(tmp_path):
    """Your own network, and a checkpoint of it without metadata."""
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    name = f"{file}:tiny"
    torch.save(foreign.build(name, 10).state_dict(), tmp_path / "mine.pth")
    return name, str(tmp_path / "mine.pth")


def last(folder):
    return str(folder / "checkpoint.pth.tar")


# --- the figures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run, argv, prefix, name",
    [
        ("base", [], "", "resnet14"),
        ("at", [], "", "resnet8"),
        ("dml", [], "", "resnet8"),
        ("dml", ["--which", "peer"], "peer_", "resnet14"),
    ],
)
def test_the_figures_are_those_of_training(runs, run, argv, prefix, name):
    """To the last digit of metrics.csv; the checkpoint is the only argument."""
    with open(runs / run / "metrics.csv", encoding="utf-8") as file:
        row = list(csv.DictReader(file))[-1]
    result = tool.main([last(runs / run), "--cuda", "0", *argv])
    for key in ("top1", "top5", "loss"):
        assert result[key] == float(row[f"{prefix}test_{key}"])
    assert (result["network"], result["data_name"], result["img_size"]) == (name, "digits", 8)
    assert (result["test_images"], result["num_class"]) == (500, 10)
    net = foreign.build(name, 10)
    assert result["parameters"] == sum(p.numel() for p in net.parameters())
    assert result["img_per_s"] > 0 and result["batch_size"] == 500


def logits(path, name, images):
    net = foreign.build(name, 10).eval()
    net.load_state_dict(read_weights(read_checkpoint(path)))
    with torch.no_grad():
        return torch.cat([net(img) for img, *_ in stream.test_batches(images, 1)]).double()


def test_agreement_by_hand(runs):
    """Image by image, in float32; also the teacher's top-1 and the KL divergence."""
    argv = ["--teacher", last(runs / "base"), "--amp", "off", "--batch_size", "77", "--cuda", "0"]
    result = tool.main([last(runs / "at"), *argv])
    images = stream.load("digits", img_size=8).test
    s = logits(last(runs / "at"), "resnet8", images).log_softmax(1)
    t = logits(last(runs / "base"), "resnet14", images).log_softmax(1)
    same = sum(int(a.argmax() == b.argmax()) for a, b in zip(s, t))
    right = sum(int(b.argmax() == label) for b, label in zip(t, images.labels))
    assert 0 < same < 500
    assert result["agreement"] == pytest.approx(100 * same / 500)
    assert result["teacher_top1"] == pytest.approx(100 * right / 500)
    kl = sum(float(b.exp() @ (b - a)) for a, b in zip(s, t)) / 500
    assert result["kl"] == pytest.approx(kl, rel=1e-4)
    assert result["batch_size"] == 77 and result["teacher_network"] == "resnet14"


def test_a_network_agrees_with_itself(runs):
    result = tool.main([last(runs / "base"), "--teacher", last(runs / "base"), "--cuda", "0"])
    assert result["agreement"] == 100 and result["kl"] == 0
    assert result["teacher_top1"] == result["top1"]


def test_warm_up_is_not_timed(monkeypatch):
    """Two slow passes, then seconds of 1, 3, 2: the median counts."""
    ticks = iter([0, 50, 0, 50, 0, 1, 0, 3, 0, 2])
    monkeypatch.setattr(tool.time, "perf_counter", lambda: next(ticks))
    cpu = utils.Precision()
    assert tool.speed(torch.nn.Identity(), torch.zeros(10, 3), torch.device("cpu"), cpu) == 5


# --- output ---------------------------------------------------------------------------------------


def test_lines_for_people(runs, capsys):
    result = tool.main([last(runs / "at"), "--teacher", last(runs / "base"), "--cuda", "0"])
    out = capsys.readouterr().out
    rows = {line[:12].strip(): line[12:] for line in out.splitlines()}
    assert rows["top-1"] == f"{result['top1']:.2f} %" and rows["loss"] == str(result["loss"])
    assert rows["network"].startswith("resnet8, 78,042 parameters, ")
    assert rows["agreement"].startswith(f"{result['agreement']:.2f} % ")
    assert "resnet14" in rows["teacher"] and len(rows) == 12


def test_stdout_has_only_the_json(mine, capsys):
    """Even if the file of a network prints. Parameters and multiply-adds are counted by hand."""
    name, path = mine
    weights = torch.load(path)
    weights["0.weight"] = torch.full_like(weights["0.weight"], float("nan"))
    torch.save(weights, path)
    tool.main([path, "--net", name, *SMALL, "--mean_std", "cifar10", "--json"])
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.out.count("\n") == 1 and "importing" in captured.err
    assert result["loss"] is None
    assert result["parameters"] == (27 * 4 + 4) + (36 * 10 + 10)
    assert result["macs"] == 27 * 4 * 3 * 3 + 36 * 10
    assert (result["mean"], result["std"]) == tuple(map(list, published.CIFAR10))


# --- other people's files -------------------------------------------------------------------------


def test_public_checkpoints(runs, tmp_path):
    """Checkpoints of RepDistiller, KD-Zoo and a bare safetensors file give the same figures."""
    from safetensors.torch import save_file

    known = tool.main([last(runs / "base"), "--cuda", "0"])
    state = read_checkpoint(last(runs / "base"))["net"]
    zoo = {
        f"module.{k.replace('layer', 'res').replace('.downsample.', '.ds.')}": v
        for k, v in state.items()
    }
    torch.save(dict(epoch=240, model=state), tmp_path / "rep.pth")
    torch.save(dict(net=zoo), tmp_path / "zoo.pth.tar")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "bare.safetensors")
    constants = ",".join(str(x) for x in known["mean"] + known["std"])
    for name in ("rep.pth", "zoo.pth.tar", "bare.safetensors"):
        result = tool.main([str(tmp_path / name), *SMALL, "--mean_std", constants])
        for key in ("network", "top1", "top5", "loss", "macs", "mean"):
            assert result[key] == known[key]


def test_the_teacher_s_metadata_is_used_if_the_student_has_none(runs, tmp_path, capsys):
    state = read_checkpoint(last(runs / "at"))["snet"]
    torch.save(state, tmp_path / "student.pth")
    teacher = ["--teacher", last(runs / "base"), "--cuda", "0"]
    result = tool.main([str(tmp_path / "student.pth"), *teacher])
    assert result["top1"] == tool.main([last(runs / "at"), *teacher])["top1"]
    assert capsys.readouterr().err == ""
    tool.main([str(tmp_path / "student.pth"), *teacher, "--mean_std", "cifar10"])
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and all(line.startswith("warning: ") for line in err)
    assert "base/checkpoint.pth.tar" in err[0] and "mean" in err[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "torchvision/resnet18",
        pytest.param("timm/test_resnet", marks=pytest.mark.soak),
        "MobileNetV2",
    ],
)
def test_foreign_networks_are_as_in_training(tmp_path, name):
    argv = ["--net_name", name, "--data_name", "digits", "--cuda", "0", "--epochs", "1"]
    argv += ["--lr", "0.01", "--img_size", "16", "--save_root", str(tmp_path)]
    folder = train_base.main(argv)["dir"]
    row = read_metrics(folder)[-1]
    result = tool.main([last(Path(folder)), "--cuda", "0"])
    assert [result[k] for k in ("top1", "loss")] == [row["test_top1"], row["test_loss"]]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, names",
    [
        ([], ["CHECKPOINT"]),
        (["{tmp}/none.pth"], ["{tmp}/none.pth"]),
        (["{tmp}"], ["{tmp}"]),
        (["{tmp}/broken.pth"], ["{tmp}/broken.pth"]),
        (["{tmp}/five.pth"], ["--data_name"]),
        (["{tmp}/five.pth", *SMALL], ["{tmp}/five.pth", "5", "digits", "--classes"]),
        (["{base}", "--teacher", "{tmp}/five.pth"], ["{tmp}/five.pth", "5"]),
        (["{base}", "--teacher", "{tmp}/none.pth"], ["{tmp}/none.pth"]),
        (["{base}", "--teacher_net", "resnet8"], ["--teacher_net", "--teacher"]),
        (["{base}", "--net", "resnet8"], ["--net", "resnet8"]),
        (["{base}", "--net", "resnet9"], ["--net", "resnet9"]),
        (["{base}", "--data_name", "cifar10"], ["--data_name", "cifar10"]),
        (["{base}", "--img_size", "16"], ["--img_size", "16"]),
        (["{base}", "--which", "peer"], ["--which"]),
        (["{base}", "--which", "both"], ["--which", "both"]),
        (["{base}", "--epochs", "3"], ["--epochs"]),
        (["{base}", "--flip", "0"], ["--flip"]),
        (["{base}", "--batch_size", "0"], ["--batch_size"]),
        (["{tmp}/mine.pth", *SMALL], ["{tmp}/mine.pth", "--net"]),
        (["{tmp}/mine.pth", *SMALL, "--net", "resnet8"], ["{tmp}/mine.pth", "resnet8"]),
        (["{tmp}/five.pth", "--data_name", "imagefolder", "--img_root", "{tmp}"], ["{tmp}"]),
    ],
)
def test_bad_input_is_one_line(runs, mine, tmp_path, capsys, argv, names):
    (tmp_path / "broken.pth").write_bytes(Path(last(runs / "at")).read_bytes()[:5000])
    torch.save(dict(model=network.build("resnet8", 5).state_dict()), tmp_path / "five.pth")
    capsys.readouterr()
    places = dict(tmp=tmp_path, base=last(runs / "base"))
    with pytest.raises(SystemExit) as stop:
        tool.main([x.format(**places) for x in argv])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert is_line(captured.err) and captured.out == ""
    wanted = [x.format(**places) for x in names]
    assert missing(wanted, captured.err, tmp_path) == [], captured.err

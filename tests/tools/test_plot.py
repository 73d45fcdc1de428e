import builtins
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import coco_like
import numpy as np
import pytest
import torch
from mistakes import is_line, missing
from PIL import Image

import network
import train_base
import train_kd
import engine.run as run_module
import utils
from detection import coco, train_det
from engine import foreign, stream
from engine.checkpoint import read_checkpoint, read_weights, save_checkpoint
from engine.run import read_metrics
from tools import plot as tool

ROOT = Path(__file__).parents[2]
SMALL = ["--data_name", "digits", "--img_size", "8", "--cuda", "0"]
PLAIN = ["--amp", "off", "--cuda", "0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two runs: 'base', trained without a teacher, and 'at', distilled."""
    root = tmp_path_factory.mktemp("runs")
    where = ["--batch_size", "128", "--lr", "0.02", "--save_root", str(root), "--note"]
    kd = ["--t_model", model(root, "base"), "--s_name", "resnet8", "--cuda", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "draw_curves", lambda *_: None)  # a second each
        train_base.main(["--net_name", "resnet14", *SMALL, *where, "base", "--epochs", "2"])
        train_kd.main(["--kd_mode", "at", *kd, *where, "at", "--epochs", "1"])
    return root


def model(root, name):
    return str(root / name / "checkpoint.pth.tar")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "figure.png"


def draw(out, *argv):
    """Draw a figure into a file; the axes that are not empty, in order."""
    figure = tool.main([*argv, "--out", str(out)])
    with Image.open(out) as image:
        assert image.format == "PNG" and min(image.size) > 150
    assert figure.get_suptitle()
    return [axis for axis in figure.axes if axis.axison]


def images(count=None):
    split = stream.load("digits", img_size=8).test
    return split if count is None else tool.pick(split, np.arange(count))


def bare(root, name, kind):
    """The network of a checkpoint, without the tool."""
    net = foreign.build(kind, 10).eval()
    found = read_checkpoint(model(root, name))
    net.load_state_dict(read_weights(found))
    return net


def alone(net, split):
    """Logits, image by image."""
    with torch.no_grad():
        return torch.cat([net(img) for img, *_ in stream.test_batches(split, 1)])


# --- curves ---------------------------------------------------------------------------------------


def test_curves_are_the_runs_metrics(runs, out):
    folders = [str(runs / "base"), f"{runs}/at/"]
    panels = draw(out, "curves", *folders, "--metric", "test_top1", "kd", "lr")
    assert [axis.get_ylabel() for axis in panels] == ["test_top1", "kd", "lr"]
    for axis in panels:
        assert [line.get_label() for line in axis.lines] == ["base", "at"]
        for folder, line in zip(folders, axis.lines):
            rows = [row.get(axis.get_ylabel(), np.nan) for row in read_metrics(folder)]
            drawn = list(line.get_ydata())
            if np.isnan(rows).all():  # no distillation: a line without points
                assert np.isnan(drawn).all()
            else:
                assert drawn == rows and list(line.get_xdata()) == list(range(1, len(rows) + 1))
        assert axis.lines[0].get_color() is not axis.lines[1].get_color()
        assert axis.get_xlabel()


def test_labels(runs, out):
    """Labels from the flag; whole paths if two folders have the same name."""
    assert tool.short(["one/base", "two/base"]) == ["one/base", "two/base"]
    assert tool.short([model(runs, "at"), "some/file.pth", "runs/x/"]) == ["at", "file.pth", "x"]
    figure = tool.main(
        ["curves", *[str(runs / "at")] * 2, "--labels", "one", "two words", "--out", str(out)]
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two words"]
    assert len(figure.axes) == 2  # by default loss and accuracy


def test_many_colors_differ():
    for count in (1, 10, 11, 100):
        found = tool.colors(count)
        assert found.shape == (count, 3) and len({tuple(color) for color in found}) == count


# --- features -------------------------------------------------------------------------------------


def test_look_gives_the_network_s_own_numbers(runs):
    """Pooled features are the mean of the last stage and the input of the classifier."""
    net, cpu = bare(runs, "at", "resnet8"), (torch.device("cpu"), utils.Precision())
    split = images(130)  # more than a batch
    logits, feat = tool.look(net, "at", split, cpu, "feat")
    assert feat.shape == (130, 64)
    torch.testing.assert_close(logits, alone(net, split), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.fc(feat), logits, rtol=1e-4, atol=1e-5)
    same, *stages = tool.look(net, "at", split, cpu, "stages")
    torch.testing.assert_close(same, logits)
    torch.testing.assert_close(stages[-1].mean((2, 3)), feat, rtol=1e-4, atol=1e-5)
    assert len(tool.look(net, "at", split, cpu, "out")) == 1


def test_tsne_is_of_the_pooled_features(runs, out, monkeypatch):
    """One panel per network, with the same images; each point has the colour of its class."""
    fed = []

    class TSNE:
        def __init__(self, perplexity, random_state):
            assert 0 < perplexity < 40 and random_state == 5

        def fit_transform(self, x):
            fed.append(x)
            return x[:, :2]

    monkeypatch.setattr("sklearn.manifold.TSNE", TSNE)
    argv = [model(runs, "base"), model(runs, "at"), "--images", "40", "--seed", "5"]
    panels = draw(out, "tsne", *argv, *PLAIN)
    order = np.random.default_rng(5).permutation(500)[:40]
    split = tool.pick(images(), order)
    color = tool.colors(10)
    for axis, x, (name, kind) in zip(panels, fed, (("base", "resnet14"), ("at", "resnet8"))):
        net = bare(runs, name, kind)
        caught = []
        net.fc.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        alone(net, split)
        np.testing.assert_allclose(x, torch.cat(caught), rtol=1e-3, atol=1e-5)
        (dots,) = axis.collections
        np.testing.assert_array_equal(dots.get_offsets(), x[:, :2])
        for label, shown in zip(images().labels[order], dots.get_facecolors()):
            np.testing.assert_array_equal(shown[:3], color[label])
        assert axis.get_title() == f"{name} ({kind})"
    names = [text.get_text() for text in panels[0].figure.legends[0].get_texts()]
    assert len(panels) == len(fed) == 2 and names == [str(digit) for digit in range(10)]


def test_tsne_is_seeded(runs, tmp_path):
    argv = ["tsne", model(runs, "at"), "--images", "30", *PLAIN]
    first, second, other = (
        draw(tmp_path / f"{i}.png", *argv, "--seed", seed)[0].collections[0].get_offsets()
        for i, seed in enumerate("223")
    )
    np.testing.assert_array_equal(first, second)
    assert first.shape == (30, 2) and not np.array_equal(first, other)


# --- correlation ----------------------------------------------------------------------------------


def by_hand(logits):
    """Pearson's coefficient of each pair of columns, from its sums."""
    x = logits.double().numpy()
    n, k = x.shape
    matrix = np.zeros((k, k))
    for a in range(k):
        for b in range(k):
            mean_a, mean_b = sum(x[:, a]) / n, sum(x[:, b]) / n
            both = sum((u - mean_a) * (v - mean_b) for u, v in zip(x[:, a], x[:, b]))
            square_a = sum((u - mean_a) ** 2 for u in x[:, a])
            square_b = sum((v - mean_b) ** 2 for v in x[:, b])
            matrix[a, b] = both / (square_a * square_b) ** 0.5 if square_a * square_b else 0
    return matrix


def test_correlations_by_hand():
    logits = torch.randn(20, 5)
    logits[:, 1] = 3.0  # never changes
    logits[:, 2] = 2 - logits[:, 0]
    found = tool.correlations(logits)
    np.testing.assert_allclose(found, by_hand(logits), atol=1e-12)
    assert found[0, 2] == pytest.approx(-1)


def test_correlation_is_student_less_teacher(runs, out):
    argv = ["--t_model", model(runs, "base"), model(runs, "at"), model(runs, "base"), *PLAIN]
    first, second, bar = draw(out, "correlation", *argv)
    student = by_hand(alone(bare(runs, "at", "resnet8"), images()))
    want = student - by_hand(alone(bare(runs, "base", "resnet14"), images()))
    (shown,), (same,) = first.images, second.images
    np.testing.assert_allclose(shown.get_array(), want, atol=1e-4)
    assert abs(same.get_array()).max() == 0  # the teacher itself
    assert shown.get_clim() == same.get_clim()
    assert shown.get_clim() == pytest.approx((-abs(want).max(), abs(want).max()), abs=1e-4)
    name, score = first.get_title().split("\n")
    assert name == "at (resnet8)" and second.get_title().endswith(" 0.0000")
    assert float(score.split()[-1]) == pytest.approx(abs(want).mean(), abs=1e-4)
    assert [text.get_text() for text in first.get_xticklabels()] == images().classes


# --- attention ------------------------------------------------------------------------------------


def test_attention_maps_by_hand():
    """Mean of squares, resized: each pixel is interpolated from the four nearest map pixels."""
    fm, size = torch.randn(2, 3, 4, 4), 8
    found = tool.attention_maps(fm, size)
    assert found.shape == (2, size, size)
    for b in range(2):
        small = [
            [sum(fm[b, c, i, j] ** 2 for c in range(3)) / 3 for j in range(4)] for i in range(4)
        ]
        for y in range(size):
            for x in range(size):
                v, u = (min(max((z + 0.5) * 4 / size - 0.5, 0), 3) for z in (y, x))
                want = 0
                for i in range(4):
                    for j in range(4):
                        want += max(0, 1 - abs(v - i)) * max(0, 1 - abs(u - j)) * small[i][j]
                assert found[b, y, x] == pytest.approx(float(want), rel=1e-4)


def test_attention_rows(runs, out):
    """One row per image and network: the image, then the map of each stage over the image."""
    models = [model(runs, "base"), model(runs, "at")]
    panels = draw(out, "attention", *models, "--images", "7,0,7", *PLAIN)
    rows = [panels[i : i + 4] for i in range(0, len(panels), 4)]
    assert len(rows) == 6 and [axis.get_title() for axis in rows[0]] == ["image"] + [
        f"stage {i}" for i in (1, 2, 3)
    ]
    nets = {"base": bare(runs, "base", "resnet14"), "at": bare(runs, "at", "resnet8")}
    expected = [(number, name) for number in (7, 0, 7) for name in nets]
    for (number, name), (first, *stages) in zip(expected, rows):
        split = tool.pick(images(), np.array([number]))
        shown = first.images[0].get_array()
        np.testing.assert_allclose(shown, split.pixels[0] / 255, atol=1e-3)
        answer = alone(nets[name], split)[0].softmax(0)
        assert first.get_ylabel().split("\n") == [
            f"image {number}: {split.classes[split.labels[0]]}",
            f"{name} (resnet{14 if name == 'base' else 8})",
            f"predicted: {split.classes[answer.argmax()]}, {answer.max():.0%}",
        ]
        _, *maps = tool.look(
            nets[name], name, split, (torch.device("cpu"), utils.Precision()), "stages"
        )
        for axis, fm in zip(stages, maps):
            image, attention = (x.get_array() for x in axis.images)
            np.testing.assert_allclose(image, split.pixels[0].numpy().mean(2) / 255, atol=1e-3)
            want = tool.attention_maps(fm, 8)[0]
            np.testing.assert_allclose(attention, want, rtol=1e-3, atol=1e-5)


def test_streamed_images_can_be_picked(tmp_path):
    rng = np.random.default_rng(0)
    for split, name in product(("train", "test"), ("a", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        for i in range(3):
            pixels = 80 * i + rng.integers(2, size=(120, 120, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    split = tool.pick(stream.load("imagefolder", tmp_path, None, 100).test, np.array([2, 0]))
    (img, target, _), *_ = stream.test_batches(split, 2)
    assert img.shape == (2, 3, 100, 100) and img[0].min() > img[1].max() and len(target) == 2


# --- boxes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A checkpoint of an untrained detector, with the folder of its training images."""
    root = tmp_path_factory.mktemp("boxes")
    coco_like.draw(root / "coco", train=4, val=4, size=64, seed=1)
    view = train_det.View((64,), 96, 8, 16)
    net = train_det.build("fasterrcnn_resnet18", 8, view)
    meta = dict(network="fasterrcnn_resnet18", num_class=8, img_root=str(root / "coco"))
    state = dict(snet=net.state_dict(), meta=meta | vars(view))
    save_checkpoint(state, root / "checkpoint.pth.tar")
    return root / "checkpoint.pth.tar"


@pytest.mark.slow
def test_boxes(detector, out):
    """Annotated and detected boxes of each image; with --score 0 all detections are drawn."""
    argv = ["boxes", str(detector), "--images", "0,2", "--score", "0", "--labels", "mine", *PLAIN]
    axes = draw(out, *argv)
    assert [axis.get_title() for axis in axes] == ["annotated", "mine", "", ""]
    val = coco.load(detector.parent / "coco").val
    for axis, i in ((axes[0], 0), (axes[2], 2)):
        boxes = val[i][1]["boxes"]
        drawn = [(min(x), min(y), max(x), max(y)) for x, y in (e.get_data() for e in axis.lines)]
        assert len(boxes) == len(drawn) and np.allclose(drawn, boxes)
    strict = ["boxes", str(detector), "--images", "0,2", "--score", "1", "--force", *PLAIN]
    assert not draw(out, *strict)[1].lines


# --- other files and networks ---------------------------------------------------------------------


def test_a_bare_file_and_your_own_network(runs, tmp_path, out):
    """Without metadata the other checkpoint or the flags give it. Numbers of stages may differ."""
    code = "from torch import nn\ndef tiny(k):\n    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), "
    code += "nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, k))\n"
    (tmp_path / "mine.py").write_text(code)
    name, path = f"{tmp_path}/mine.py:tiny", str(tmp_path / "mine.pth")
    torch.save(foreign.build(name, 10).state_dict(), path)
    argv = ["attention", path, "--images", "1", "--net_name", name, *SMALL]
    assert len(draw(out, *argv, "--labels", "my own")) == 2
    state = read_weights(read_checkpoint(model(runs, "at")))
    torch.save(state, tmp_path / "bare.pth")
    argv = ["correlation", "--t_model", model(runs, "base"), str(tmp_path / "bare.pth"), *PLAIN]
    assert draw(out, *argv, "--force")[0].get_title().startswith("bare.pth (resnet8)\n")


def test_the_first_checkpoint_with_a_dataset_decides(runs, tmp_path):
    found = read_checkpoint(model(runs, "base"))
    torch.save(dict(net=found["net"], meta=found["meta"] | dict(img_size=16)), tmp_path / "16.pth")
    models = [model(runs, "base"), str(tmp_path / "16.pth")]
    for paths, size in ((models, 8), (models[::-1], 16)):
        args = tool.parse(["tsne", *paths, "--out", "x.png", *PLAIN])
        assert tool.load(args)[2].size == size


# --- bad input ------------------------------------------------------------------------------------

LONG = "x" * 300
SHOWN = "x" * 40 + "*"  # the part of it that a message must show


@pytest.mark.parametrize(
    "argv, names",
    [
        ([], ["command"]),
        (["pie"], ["pie"]),
        (["curves"], ["RUN", "--out"]),
        (["curves", "{base}"], ["--out"]),
        (["curves", "{tmp}/none", "{out}"], ["{tmp}/none"]),
        (["curves", "{base}/log.txt", "{out}"], ["{base}/log.txt"]),
        (["curves", "{base}", "{tmp}", "{out}"], ["{tmp}", "metrics.csv"]),
        (["curves", "{tmp}/bad", "{out}"], ["{tmp}/bad/metrics.csv"]),
        (["curves", "{base}", "--metric", "top1", "{out}"], ["top1"]),
        (["curves", "{base}", "--metric", "ce", "phase", "{out}"], ["phase"]),
        (["curves", "{base}", "--metrics", "ce", "{out}"], ["--metrics", "--metric"]),
        (["curves", "{base}", "--labels", "a", "b", "{out}"], ["--labels"]),
        (["curves", "{base}", "--out={tmp}"], ["--out", "{tmp}"]),
        (["curves", "{base}", "--out={tmp}/x.pdf"], ["--out", "{tmp}/x.pdf"]),
        (["curves", "{base}", "--out={tmp}/dir.png"], ["{tmp}/dir.png"]),
        (["curves", "{base}", "--out={tmp}/none/x.png"], ["{tmp}/none/x.png"]),
        (["curves", "{base}", "--out={tmp}/old.png"], ["{tmp}/old.png", "--force"]),
        (["curves", "{base}", f"--out={LONG}.png"], [SHOWN]),
        (["curves", "{base}", f"--out={{tmp}}/{LONG}/x.png"], ["{tmp}/" + SHOWN]),
        (["curves", "{base}", "--out=a\0b.png"], ["--out"]),
        (["curves", "{base}", "--out=a\udce4.png"], ["--out", "a\\udce4.png"]),
        (["curves", LONG, "{out}"], [SHOWN]),
        (["curves", "a\0b", "{out}"], ["RUN"]),
        (["curves", "", "{out}"], ["RUN"]),
        (["curves", "{base}", "--labels", "a\0b", "{out}"], ["--labels"]),
        (["tsne", LONG, "{out}"], [SHOWN]),
        (["tsne", "a\0b", "{out}"], ["MODEL"]),
        (["tsne", "{model}", "--net_name", "a\0b", "{out}"], ["--net_name"]),
        (["correlation", "{model}", "--t_model=a\0b", "{out}"], ["--t_model"]),
        (["correlation", "{model}", f"--t_model={LONG}", "{out}"], [SHOWN]),
        (["tsne", "{base}", "{out}"], ["{base}"]),
        (["tsne", "{tmp}/none.pth", "{out}"], ["{tmp}/none.pth"]),
        (["tsne", "{model}", "--images", "4", "{out}"], ["--images", "4"]),
        (["tsne", "{tmp}/five.pth", "{out}"], ["--data_name"]),
        (["tsne", "{model}", "--data_name", "cifar10", "{out}"], ["--data_name", "cifar10"]),
        (["tsne", "{model}", "--net_name", "resnet8", "{out}"], ["--net_name", "resnet8"]),
        (["tsne", "{model}", "--net_name", "a", "b", "{out}"], ["--net_name"]),
        (["tsne", "{tmp}/nan.pth", *SMALL, "{out}"], ["nan.pth"]),
        (["correlation", "{model}", "{out}"], ["--t_model"]),
        (["correlation", "{model}", "--t_model={tmp}/five.pth", "{out}"], ["{tmp}/five.pth", "5"]),
        (["correlation", "{tmp}/five.pth", "--t_model={model}", "{out}"], ["--num_class", "5"]),
        (["correlation", "{model}", "--t_model={tmp}/none", "{out}"], ["{tmp}/none"]),
        (["boxes", "{model}", "--images", "0", "{out}"], ["resnet14"]),
        (["boxes", "{model}", "{out}"], ["--images"]),
        (["attention", "{model}", "{out}"], ["--images"]),
        (["attention", "{model}", "--images", "3,500", "{out}"], ["--images", "500"]),
        (["attention", "{model}", "--images=-1", "{out}"], ["--images", "-1"]),
        (["attention", "{model}", "--images", "1,", "{out}"], ["--images"]),
        (["attention", "{model}", "--images", "1", "--seed", "1", "{out}"], ["--seed"]),
    ],
)
def test_bad_input_is_one_line(runs, tmp_path, capsys, argv, names):
    for folder in ("bad", "dir.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bad" / "metrics.csv").write_text("epoch,ce\n1,2,3,4\n")
    (tmp_path / "old.png").write_text("old")
    torch.save(dict(model=network.build("resnet8", 5).state_dict()), tmp_path / "five.pth")
    state = network.build("resnet8", 10).state_dict()
    state["fc.bias"][3] = float("nan")
    torch.save(dict(model=state), tmp_path / "nan.pth")
    places = dict(base=runs / "base", model=model(runs, "base"), tmp=tmp_path)
    places["out"] = f"--out={tmp_path / 'x.png'}"
    with pytest.raises(SystemExit) as stop:
        tool.main([x.format(**places) for x in argv])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert is_line(captured.err) and captured.out == ""
    wanted = [x.format(**places) for x in names]
    assert missing(wanted, captured.err, tmp_path) == [], captured.err
    assert not (tmp_path / "x.png").exists() and (tmp_path / "old.png").read_text() == "old"


@pytest.mark.parametrize("package, what", [("matplotlib", "curves"), ("sklearn.manifold", "tsne")])
def test_a_missing_package_is_one_line(runs, out, monkeypatch, capsys, package, what):
    def without(name, *args, **kwargs):
        if name == package:
            raise ImportError
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    where = str(runs / "at") if what == "curves" else model(runs, "at")
    with pytest.raises(SystemExit) as stop:
        tool.main([what, where, "--out", str(out)])
    assert stop.value.code == 2 and not out.exists()
    captured = capsys.readouterr()
    assert is_line(captured.err) and "pip install" in captured.err


def test_force_writes_over(runs, out):
    Path(out).write_text("old")
    draw(out, "curves", str(runs / "at"), "--force")


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", [pytest.param("nonsense", marks=pytest.mark.slow), "module://nonsense"]
)
def test_a_wrong_backend_changes_nothing(backend, runs, out):
    """MPLBACKEND chooses a window system, which figures do not use."""
    command = [sys.executable, "tools/plot.py", "curves", str(runs / "at"), "--out", str(out)]
    env = dict(os.environ, MPLBACKEND=backend)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and Path(out).exists(), done.stderr

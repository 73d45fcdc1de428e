"""Two processes that train together, as torchrun starts them: on the CPU, through gloo."""

from dataclasses import replace
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # torchrun starts this file

import utils  # noqa: E402
from messages import ends, one_line  # noqa: E402
from engine import distributed, stream  # noqa: E402
from engine.checkpoint import save_checkpoint  # noqa: E402
from engine.distiller import Distiller  # noqa: E402
from engine.run import Run, read_metrics  # noqa: E402
from kd_losses import METHODS  # noqa: E402

pytestmark = pytest.mark.slow

TRAINED = ["st", "at", "rkd", "crd", "fsp", "sobolev", "dml"]
SAME = [
    "st",
    "at",
    "rkd",
    "sp",
    "pkt",
    "irg",
    "cc",
    "dist",
    "itrd",
    "mlkd",
    "semckd",
]  # as if there were one process


def worker(root: Path) -> dict:
    """What each of the two processes does. Returns what the tests look at."""
    import toys

    import train_base
    import train_kd

    jobs = kept(Distiller)
    leave, utils.leave_ranks = utils.leave_ranks, lambda: None  # one meeting for all runs
    small = ["--data_name", "digits", "--img_size", "12", "--cuda", "0", "--save_root", str(root)]
    base = ["--net_name", "resnet14", *small, "--epochs", "1", "--note"]
    train_base.main([*base, "t"])
    utils.all_gather(None)  # the file is there
    found = {"world": utils.world()}
    for mode in TRAINED:
        argv = ["--kd_mode", mode, "--t_name", "resnet14", "--s_name", "resnet8", *small]
        argv += toys.small_flags(mode) + ["--epochs", "2", "--note", mode, "--print_freq", "5"]
        argv += ["--t_model", f"{root}/t/model_best.pth.tar"] if mode != "dml" else []
        argv += ["--gather"] if mode == "rkd" else []
        train_kd.main(argv)
        distiller = jobs[-1]
        modules = (distiller.student.net, distiller.teacher.net, distiller.added)
        sums = [float(x.double().sum()) for m in modules for x in m.state_dict().values()]
        found[mode] = len(set(map(str, utils.all_gather(sums)))) == 1

    found["detectors"] = detectors(root)
    for mode in SAME:
        found[f"{mode} alone"] = compare(mode)
    leave()
    return found


def kept(kind: type) -> list:
    """Where every object of a class will be found from now on."""
    made, make = [], kind.__init__

    def init(self, *args):
        make(self, *args)
        made.append(self)

    kind.__init__ = init
    return made


def detectors(root: Path) -> bool:
    """Whether a distilled detector and its fusion are equal on both."""
    import coco_like

    from detection import train_det

    view = train_det.View((64,), 96, 8, 16)
    if utils.rank() == 0:
        coco_like.draw(root / "coco", train=8, val=4, size=64, seed=1)
        teacher = train_det.build("fasterrcnn_resnet18", 8, view)
        meta = dict(network="fasterrcnn_resnet18", num_class=8, **vars(view))
        save_checkpoint(dict(snet=teacher.state_dict(), meta=meta), root / "det.pth.tar")
    utils.all_gather(None)
    jobs = kept(train_det.Distiller)
    argv = ["--kd_mode", "reviewdkd", "--t_model", f"{root}/det.pth.tar", "--cuda", "0"]
    argv += ["--s_name", "fasterrcnn_resnet18", "--img_root", f"{root}/coco", "--batch_size", "4"]
    argv += ["--iters", "2", "--workers", "0", "--save_root", str(root), "--note", "det"]
    train_det.main(argv)
    modules = (jobs[-1].student, jobs[-1].kd)
    sums = [float(x.double().sum()) for m in modules for x in m.state_dict().values()]
    return len(set(map(str, utils.all_gather(sums)))) == 1


def compare(mode: str) -> float:
    """How far losses and gradients of two shares of a batch are from those of the whole batch."""
    import toys

    import train_kd

    def step(batch, gathers):
        torch.manual_seed(0)
        distiller = toys.distiller(mode, argv=["--batch_size", "128"])
        for module in (distiller.student.net, distiller.teacher.net, distiller.added):
            module.double()
        for part in distiller.added:
            part.gather = gathers
        phase = distiller.phases[0]
        params = distiller.set_trainable(phase)
        distiller.student.net.eval()
        optimizer = torch.optim.SGD(params, lr=0.0)
        precision = utils.Precision()
        terms = train_kd.train_step(
            distiller, phase, optimizer, batch, toys.weights(distiller, 3.0), precision
        )
        meter = utils.Meter()
        meter.add(terms, len(batch.target))
        return meter, torch.cat([p.grad.flatten() for p in params if p.grad is not None])

    torch.manual_seed(5)
    whole = toys.batch(128, strong=mode == "mlkd")
    half = slice(64 * utils.rank(), 64 * utils.rank() + 64)
    share = replace(whole, **{name: x[half] for name, x in whole.tensors().items()})
    relates = METHODS[mode].relational
    meter, grad = step(share, relates)
    average, distributed.average_gradients = distributed.average_gradients, lambda optimizer: None
    single, expected = step(whole, False)
    distributed.average_gradients = average
    terms, wanted = meter.read(), single.read()  # the whole batch twice: the same mean
    off = [abs(terms[name] - wanted[name]) / abs(wanted[name]) for name in ("ce", "kd")]
    return max(*off, float((grad - expected).norm() / expected.norm()))


def torchrun(*argv, **more) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run(
        [*command, *argv], cwd=ROOT, capture_output=True, text=True, env=env, **more
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    done = torchrun(str(Path(__file__)), str(root), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((root / "found.json").read_text())
    assert result["world"] == 2
    return root, result


@pytest.mark.parametrize("mode", TRAINED)
def test_both_end_with_equal_weights(mode, found):
    """Banks, adapters and both of two networks that learn included; one wrote, for both."""
    root, result = found
    assert result[mode] is True
    assert len((root / mode / "metrics.csv").read_text().splitlines()) >= 3
    log = (root / mode / "log.txt").read_text()
    assert log.count("teacher test_top1") == (mode != "dml") and "2 processes" in log


def test_both_end_with_the_same_detector(found):
    root, result = found
    assert result["detectors"] is True
    assert "2 processes" in (root / "det" / "log.txt").read_text()


@pytest.mark.parametrize("mode", SAME)
def test_two_shares_are_the_whole_batch(mode, found):
    """Batch norm in eval mode; what compares images does so across the processes."""
    assert found[1][f"{mode} alone"] < 1e-5


def test_goes_on_with_another_number_of_processes(found, tmp_path):
    """A run of one process, stopped after its first epoch, ends on two; and bad input is said
    once."""
    import train_kd

    root, _ = found
    argv = ["--kd_mode", "crd", "--t_model", f"{root}/t/model_best.pth.tar", "--s_name", "resnet8"]
    argv += ["--nce_n", "8", "--feat_dim", "8", "--cuda", "0", "--img_size", "12"]
    argv += ["--epochs", "2", "--save_root", str(tmp_path), "--note", "r"]
    epoch = Run.epoch

    def interrupted(self, *args, **kwargs):
        epoch(self, *args, **kwargs)
        raise KeyboardInterrupt

    Run.epoch = interrupted
    try:
        with pytest.raises(SystemExit):
            train_kd.main(argv)
    finally:
        Run.epoch = epoch
    done = torchrun("train_kd.py", *argv, "--resume", timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["epoch"] for row in read_metrics(tmp_path / "r")] == [1, 2]
    again = torchrun("train_kd.py", *argv, timeout=300)
    assert again.returncode
    one_line(errors(again), tmp_path / "r")


def errors(done: subprocess.CompletedProcess) -> str:
    """What the processes said of mistakes."""
    return "\n".join(x for x in done.stderr.splitlines() if x.startswith("error: "))


def alone(how: str, root: str) -> None:
    """A training in whose fourth step the second process has a mistake, a defect, or is killed."""
    import train_base
    import utils

    batches = stream.train_batches

    def interrupted(*args, **kwargs):
        for i, batch in enumerate(batches(*args, **kwargs)):
            if i == 3 and utils.rank() == 1:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise (utils.UserError if how == "mistake" else TypeError)("a.png is no image")
            yield batch

    stream.train_batches = interrupted
    argv = ["--net_name", "resnet8", "--data_name", "digits", "--img_size", "12", "--cuda", "0"]
    train_base.main([*argv, "--epochs", "2", "--save_root", root, "--note", "r"])


@pytest.mark.parametrize(
    "how, line",
    [
        ("mistake", "error: a.png is no image"),
        ("killed", "error: "),
        ("defect", "TypeError: a.png"),
    ],
)
def test_one_process_fails_and_one_speaks(how, line, tmp_path):
    done = torchrun(str(Path(__file__)), how, str(tmp_path), timeout=120)
    own = done.stderr.split("torch.distributed.elastic.multiprocessing.errors")[0]
    lines = [x.removeprefix("[rank1]: ") for x in own.splitlines()]
    said = [x for x in lines if x.startswith(("error: ", "RuntimeError", "TypeError"))]
    assert done.returncode and len(said) == 1 and said[0].startswith(line), done.stderr
    assert (tmp_path / "r" / "log.txt").exists()


@pytest.mark.parametrize(
    "argv, named", [("--epochs x", ["--epochs", "x"]), ("--batch_size 2", ["--batch_size", 2])]
)
def test_all_make_the_same_mistake_and_one_says_it(argv, named, tmp_path):
    small = ["--net_name", "resnet8", "--data_name", "digits", "--img_size", "12", "--cuda", "0"]
    argv = [*small, *argv.split(), "--save_root", str(tmp_path / "runs")]
    done = torchrun("train_base.py", *argv, timeout=120)
    assert done.returncode
    one_line(errors(done), *named)
    assert not (tmp_path / "runs").exists()


def test_shares_that_cannot_be_equal_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys
):
    """Of detectors, and where there are too few images for all; as if there were two processes."""
    import coco_like
    import train_base
    import utils
    from PIL import Image

    from detection import train_det

    monkeypatch.setattr(utils, "world", lambda: 2)
    monkeypatch.setattr(utils, "rank", lambda: 0)
    monkeypatch.setattr(utils, "all_gather", lambda value: [value])
    monkeypatch.setattr(utils, "leave_ranks", lambda: None)
    coco_like.draw(tmp_path / "coco", train=8, val=4, size=64, seed=1)
    for split, name in ((x, y) for x in ("train", "test") for y in ("cat", "dog")):
        (tmp_path / "img" / split / name).mkdir(parents=True)
        Image.new("RGB", (12, 12)).save(tmp_path / "img" / split / name / "0.png")
    detect = (
        f"--kd_mode none --s_name fasterrcnn_resnet18 --img_root {tmp_path}/coco --batch_size 3"
    )
    classify = f"--net_name resnet8 --data_name imagefolder --img_root {tmp_path}/img"
    for main, argv, named in (
        (train_det.main, detect, ["--batch_size", 3, 2]),
        (train_base.main, classify, ["--batch_size", 2]),
    ):
        with ends(capsys, *named):
            main([*argv.split(), "--cuda", "0", "--save_root", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if len(sys.argv) > 2:
        alone(*sys.argv[1:])
        sys.exit()
    out = worker(Path(sys.argv[1]))
    if os.environ["RANK"] == "0":
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps(out))

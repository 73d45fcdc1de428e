"""--resume refuses a checkpoint that was edited, in one line, and leaves it as it is."""

import os
import shlex
import shutil
import signal

import pytest
import torch
from mistakes import DIGITS, META, is_line, missing, snapshot

import network
import train_base
import train_kd
import utils
from engine.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Runs that were stopped inside their second epoch, and the flags that continue with them."""
    root = tmp_path_factory.mktemp("stopped")
    few = shlex.split(f"{DIGITS} --cuda 0 --epochs 2 --batch_size 300 --save_root {root} --note")
    commands = dict(
        base=(train_base.main, ["--net_name", "resnet8", *few, "base"]),
        fit=(train_kd.main, shlex.split("--kd_mode fitnet+crd --lambda_kd 1,0 --nce_n 64")),
        kd=(train_kd.main, shlex.split("--kd_mode dml --net1_name resnet14 --s_name resnet8")),
    )
    commands["kd"][1].extend([*few, "kd"])
    net = network.build("resnet14", 10).state_dict()
    torch.save(dict(net=net, meta=META | dict(network="resnet14")), root / "t.pth")
    commands["fit"][1].extend(
        ["--t_model", str(root / "t.pth"), "--s_name", "resnet8", *few, "fit"]
    )
    for main, argv in commands.values():
        add, count = utils.Meter.add, []

        def counted(self, *args):
            add(self, *args)
            count.append(self)
            if len(count) == 8:  # five steps, one or two evaluations
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils.Meter, "add", counted)
            with pytest.raises(SystemExit):
                main(argv)
    return root, commands


def at(path, value):
    """Put `value` at a path of a checkpoint's keys, or what `value` makes of what is there."""
    *way, last = (int(x) if x.isdigit() else x for x in path.split("."))

    def change(saved):
        part = saved
        for key in way:
            part = part[key]
        part[last] = value(part.get(last)) if callable(value) else value

    return change


def without(path, key):
    return at(path, lambda part: {k: v for k, v in part.items() if k != key})


def longer(saved):
    for key in ("history", "timing"):
        saved[key] += [dict(saved[key][0], epoch=2, row=2), dict(saved[key][0], epoch=3, row=3)]
    saved["epoch"] = 3


def done(saved):
    for key in ("history", "timing"):
        saved[key].append(dict(saved[key][0], epoch=2, row=2))
    saved["epoch"] = 2


NAN, INF = float("nan"), float("inf")
# a change, then what the message must name besides the file
EDITED = [
    *((at("inside.step", x), "step", repr(x)) for x in (-1, 0, 1.5, True, "2", None, 10**6, 6)),
    *((at("inside", x), "meter") for x in ({}, [], 0)),
    (without("inside", "meter"), "meter"),
    (at("inside.meter", []),),
    *((at("inside.meter", lambda x, n=n: [(*x[0][:2], n)]), repr(n)) for n in (0, -300, 1.5, True)),
    (at("inside.meter", lambda x: [(x[0][0], x[0][1][:1], x[0][2])]),),
    (at("inside.meter", lambda x: [(x[0][0], x[0][1] * NAN, x[0][2])]), "inside"),
    *((at("inside.seconds", x), repr(x)) for x in (-1.0, NAN, INF, "1", True)),
    (at("optimizer.param_groups.0.weight_decay", -1.0), "weight_decay", "-1.0"),
    (at("optimizer.param_groups.0.momentum", 0.5), "momentum", "0.5", "0.9"),
    (at("optimizer.param_groups.0.nesterov", False), "nesterov", "False"),
    (at("optimizer.state.0.momentum_buffer", lambda x: x * NAN), "optimizer"),
    (longer, "3"),
    (done, "step", "5"),
    (at("history.0.epoch", 2), "1"),
    (at("epoch", 7), "7"),
    (at("timing.0.seconds", NAN), "nan"),
    (at("timing.0.seconds", -1.0), "-1.0"),
    (at("timing.0.row", 2), "1"),
    *((at("best.epoch", x), repr(x)) for x in (5, -1, 0.5, 0)),
    *((at("best.score", x), repr(x)) for x in (99.5, NAN, "x")),
    (at("sources", 3),),
    (at("sources.data", 3),),
]
IMAGES = (at("sources.data.train.images", 3), "--img_root", "./datasets")
TEACHER = (at("sources.teacher", "abc"), "--t_model")
OF_BASE = [
    (at("net", lambda net: net | dict(more=torch.zeros(10))),),
    (lambda saved: saved["net"].update({"fc.bias": torch.full((10,), NAN)}), "net"),
    (lambda saved: saved["net"].update({"bn1.running_var": torch.full((16,), INF)}), "net"),
]
OF_KD = [
    (lambda saved: saved["net1"].update({"fc.bias": torch.full((10,), NAN)}), "net1"),
    (lambda saved: saved["snet"].update({"fc.bias": torch.full((10,), NAN)}), "snet"),
    (at("history.0.phase", "init"), "1"),
]
OF_FIT = [  # one of its parts, of weight 0, has seen no batch yet
    (at("kd", lambda kd: {k: x * NAN for k, x in kd.items()}), "memory_s"),
]
FILE = "checkpoint.pth.tar"
CASES = [
    *(("base", change, FILE, *names) for change, *names in EDITED + OF_BASE),
    *(("kd", change, FILE, *names) for change, *names in EDITED + OF_KD),
    *(("fit", change, FILE, *names) for change, *names in OF_FIT),
    *(("base", *IMAGES), ("kd", *IMAGES), ("kd", *TEACHER)),  # no fault of the checkpoint
]


@pytest.mark.parametrize(
    "which, change, names",
    [pytest.param(*case[:2], case[2:], id=f"{case[0]} {case[2:]}") for case in CASES],
)
def test_an_edited_checkpoint_is_refused(which, change, names, stopped, tmp_path, capsys):
    root, commands = stopped
    main, argv = commands[which]
    folder = shutil.copytree(root / which, tmp_path / which)
    saved = read_checkpoint(folder / FILE)
    assert len(saved["history"]) == 1 and saved["inside"]["step"] > 0
    change(saved)
    torch.save(saved, folder / FILE)
    before = snapshot(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--save_root", str(tmp_path), "--resume"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and is_line(err) and out == ""
    wanted = [str(folder / FILE) if name == FILE else name for name in names]
    assert missing(wanted, err, tmp_path) == [], err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("which", ["base", "kd", "fit"])
def test_an_untouched_checkpoint_is_accepted(which, stopped, tmp_path):
    """Or the table would prove nothing."""
    root, commands = stopped
    main, argv = commands[which]
    shutil.copytree(root / which, tmp_path / which)
    main([*argv, "--save_root", str(tmp_path), "--resume", "--dry_run"])

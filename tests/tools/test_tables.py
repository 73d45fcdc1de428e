from functools import partial

import pytest
from finished_runs import DIGITS, finished_run
from messages import ends

import train_base
from tools import tables, tables_work

LONG = "x" * 300


@pytest.fixture
def finished(tmp_path):
    """Make the folder of a finished run of resnet20 -> resnet8 in the table `small`."""
    return partial(finished_run, tmp_path)


@pytest.mark.parametrize(
    "argv, names",
    [
        ([], "command"),
        (["show"], "TABLE"),
        (["run", "crdd"], "crdd crd"),
        (["run", "crd", "--methods", "att"], "att at"),
        (["run", "crd", "--pairs", "resnet56-resnet21"], "resnet56-resnet21 resnet56-resnet20"),
        (["run", "small"], "--data small"),
        (["run", "small", "--data", "imagefolder"], "--img_root imagefolder"),
        (["run", "small", "--data", "digit"], "digit"),
        (["run", "small", "--data", "digits", "--seeds", "0"], "--seeds 0"),
        (["run", "small", "--data", "digits", "--teacher", "nowhere"], "nowhere"),
        (["run", "small", "--data", "imagefolder", "--img_root", "nowhere"], "nowhere"),
        (["show", "crd", "--seeds", "2"], "--seeds"),
        (["show", "crd", "--into", "nowhere.md"], "--into nowhere.md"),
    ],
)
def test_bad_input_is_one_line(argv, names, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tables_work, "launch", lambda *args: pytest.fail("a training was started"))
    runs = ["--runs", str(tmp_path / "runs")] if argv[1:] else []
    with ends(capsys, *names.split()):
        tables.main([*argv, *runs])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_teacher_that_is_another_network(tmp_path, capsys):
    argv = ["--net_name", "resnet14", "--data_name", "digits", "--epochs", "1", "--note", "t"]
    teacher = train_base.main([*argv, "--save_root", str(tmp_path)])["dir"] + "/model_best.pth.tar"
    capsys.readouterr()
    with ends(capsys, "--teacher", teacher, "resnet14", "resnet20"):
        tables.main(["run", "small", *DIGITS, "--teacher", teacher])


@pytest.mark.parametrize("command", ["show", "run"])
@pytest.mark.parametrize(
    "argv, wanted",
    [
        (["--out", "{file}"], ["--out", "{file}"]),
        (["--out", "{file}/x"], ["--out", "{file}/x", "{file}"]),
        (["--out", "{link}"], ["--out", "{link}"]),
        (["--out", "{tmp}/" + LONG], ["--out", "{tmp}*"]),
        (["--out", "a\0b"], ["--out"]),
        (["--out", ""], ["--out"]),
        (["--out", "/proc/none"], ["--out", "/proc/none"]),
        (["--out", "{taken}"], ["--out", "{taken}", "small.md"]),
        (["--runs", "{file}"], ["--runs", "{file}"]),
        (["--runs", "{file}/x"], ["--runs", "{file}/x", "{file}"]),
        (["--runs", "{tmp}/" + LONG], ["--runs", "{tmp}*"]),
        (["--runs", "a\0b"], ["--runs"]),
        (["--into", "{tmp}/none.md"], ["--into", "{tmp}/none.md"]),
        (["--into", "{file}"], ["--into", "{file}"]),
        (["--into", "{tmp}"], ["--into", "{tmp}"]),
        (["--into", "{latin}"], ["--into", "{latin}"]),
        (["--into", "{tmp}/" + LONG], ["--into", "{tmp}*"]),
        (["--into", "a\0b"], ["--into"]),
    ],
)
def test_a_bad_place_is_named_before_anything_is_trained(
    command, argv, wanted, finished, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tables_work, "launch", lambda *_: pytest.fail("a training was started"))
    finished()
    names = dict(tmp=tmp_path, file=tmp_path / "file", link=tmp_path / "link")
    names |= dict(taken=tmp_path / "taken", latin=tmp_path / "latin.md")
    names["file"].write_text("mine")
    names["link"].symlink_to("gone")
    (names["taken"] / "small.md").mkdir(parents=True)
    names["latin"].write_bytes(b"\xe4 <!-- tables.py show small --> <!-- end of the table -->")
    before = sorted(tmp_path.rglob("*"))
    own = [] if "--runs" in argv else ["--runs", str(tmp_path / "runs")]
    more = [*DIGITS, "--methods", "baseline"] if command == "run" else []
    with ends(capsys, *(x.format(**names) for x in wanted)) as said:
        tables.main([command, "small", *own, *more, *(x.format(**names) for x in argv)])
    assert said[0].startswith("error: ") and len(said[0]) < 1000
    assert sorted(tmp_path.rglob("*")) == before and names["file"].read_text() == "mine"

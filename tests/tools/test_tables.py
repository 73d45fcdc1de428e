from functools import partial

import pytest
from finished_runs import DIGITS, finished_run

import train_base
from tools import tables, tables_work

LONG = "x" * 300


@pytest.fixture
def finished(tmp_path):
    """Make the folder of a finished run of resnet20 -> resnet8 in the table `small`."""
    return partial(finished_run, tmp_path)


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "the following arguments are required"),
        (["show"], "the following arguments are required: TABLE"),
        (["run", "crdd"], "invalid choice: 'crdd'"),
        (["run", "crd", "--methods", "att"], "unknown method 'att'; did you mean at"),
        (["run", "crd", "--pairs", "resnet56-resnet21"], "did you mean resnet56-resnet20"),
        (["run", "small"], "--data is required"),
        (["run", "small", "--data", "imagefolder"], "needs --img_root DIR"),
        (["run", "small", "--data", "digit"], "digit"),
        (["run", "small", "--data", "digits", "--seeds", "0"], ">= 1"),
        (["run", "small", "--data", "digits", "--teacher", "nowhere"], "nowhere"),
        (["run", "small", "--data", "imagefolder", "--img_root", "nowhere"], "nowhere"),
        (["show", "crd", "--seeds", "2"], "unknown flag --seeds"),
        (["show", "crd", "--into", "nowhere.md"], "nowhere.md has no place"),
    ],
)
def test_bad_input_is_one_line(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tables_work, "launch", lambda *args: pytest.fail("a training was started"))
    runs = ["--runs", str(tmp_path / "runs")] if argv[1:] else []
    with pytest.raises(SystemExit) as error:
        tables.main([*argv, *runs])
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_teacher_that_is_another_network(tmp_path, capsys):
    argv = ["--net_name", "resnet14", "--data_name", "digits", "--epochs", "1", "--note", "t"]
    teacher = train_base.main([*argv, "--save_root", str(tmp_path)])["dir"] + "/model_best.pth.tar"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        tables.main(["run", "small", *DIGITS, "--teacher", teacher])
    assert "is a resnet14, the table needs resnet20" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["show", "run"])
@pytest.mark.parametrize(
    "argv, says",
    [
        (["--out", "{file}"], "--out {file}: expected a folder"),
        (["--out", "{file}/x"], "{file} is a file"),
        (["--out", "{link}"], "{link} is a file"),
        (["--out", "{tmp}/" + LONG], "File name too long"),
        (["--out", "a\0b"], "--out: expected a name"),
        (["--out", ""], "--out: expected a name"),
        (["--out", "/proc/none"], "cannot be written"),
        (["--out", "{taken}"], "small.md is a folder"),
        (["--runs", "{file}"], "--runs {file}: expected a folder"),
        (["--runs", "{file}/x"], "{file} is a file"),
        (["--runs", "{tmp}/" + LONG], "File name too long"),
        (["--runs", "a\0b"], "--runs: expected a name"),
        (["--into", "{tmp}/none.md"], "none.md has no place for the table"),
        (["--into", "{file}"], "has no place for the table"),
        (["--into", "{tmp}"], "has no place for the table"),
        (["--into", "{latin}"], "has no place for the table"),
        (["--into", "{tmp}/" + LONG], "has no place for the table"),
        (["--into", "a\0b"], "--into: expected a name"),
    ],
)
def test_a_bad_place_is_found_before_anything_is_trained(
    command, argv, says, finished, tmp_path, capsys, monkeypatch
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
    with pytest.raises(SystemExit) as stop:
        tables.main([command, "small", *own, *more, *(x.format(**names) for x in argv)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert says.format(**names) in err and len(err) < 1000
    assert sorted(tmp_path.rglob("*")) == before and names["file"].read_text() == "mine"

import json
import os
import shutil
from functools import partial

import pytest
from finished_runs import DIGITS, HEAD, ROW, args_with, finished_run, record, show
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from messages import ends, one_line

from tools import tables, tables_files, tables_runs, tables_work


@pytest.fixture
def finished(tmp_path):
    """Make the folder of a finished run of resnet20 -> resnet8 in the table `small`."""
    return partial(finished_run, tmp_path)


# --- folders that are damaged, moved or copied ----------------------------------------------------

RESULTS = {  # the file, and the names in the warning
    "": ["result.json"],
    '{"last": 1': ["result.json"],
    "[1, 2]": ["result.json", "[1, 2]"],
    "null": ["result.json", "None"],
    "{}": ["last", "None"],
    '{"last": "50", "best": 50, "seconds": 1}': ["last", "'50'"],
    '{"last": 50, "best": NaN, "seconds": 1}': ["best", "nan"],
    '{"last": 50, "best": 50, "seconds": Infinity}': ["seconds", "inf"],
    '{"last": 50, "best": 50, "seconds": -1}': ["seconds", "-1"],
    '{"last": true, "best": 50, "seconds": 1}': ["last", "True"],
    '{"last": [50], "best": 50, "seconds": 1}': ["last", "[50]"],
    '{"last": 50, "best": 50, "seconds": 1, "peer_last": 3}': ["best", "None"],
    "9" * 5000: ["result.json"],
    "[" * 100_000: ["result.json"],
    b"\xff\xfe{\x00": ["result.json"],
    b"\x00" * 100: ["result.json"],
}
ARGS = {
    "": ["args.json"],
    "[]": ["args.json", "[]"],
    "{}": ["args.json", "recipe"],
    '{"recipe": [1]}': ["args.json", "recipe", "data_name"],
    args_with(meta=3): ["args.json", "meta", "network"],
    args_with(meta=dict(network=["x"])): ["student", "['x']"],
    args_with(meta=dict(network="x" * 999)): ["student", "'xxx*"],
    args_with(meta=dict(network="a\nb")): ["student", "'a\\nb'"],
    args_with(meta=dict(network="\ud800")): ["student"],
    args_with(teacher=None): ["args.json", "teacher", "network"],
    args_with(teacher=dict(network="")): ["student", "''"],
    args_with(recipe=dict(epochs="2")): ["epochs", "'2'"],
    args_with(recipe=dict(epochs=2.5)): ["epochs", "2.5"],
    args_with(recipe=dict(epochs=0)): ["epochs", "0"],
    args_with(recipe=dict(data_name=None)): ["data", "None"],
    args_with(recipe=dict(s_name=dict(a=1))): ["student", "{'a': 1}"],
    args_with(recipe=dict(seed=5)): ["args.json", "seed", "5"],
    args_with(recipe=dict(kd_mode="at")): ["args.json", "kd_mode", "'at'"],
    args_with(recipe=dict(protocol="crd")): ["args.json", "protocol", "'crd'"],
    args_with(recipe=dict(note="st-2")): ["args.json", "note", "'st-2'"],
    args_with(recipe=dict(save_root="runs/other")): ["args.json", "save_root", "'runs/other'"],
    args_with(added="many"): ["added", "'many'"],
}


@pytest.mark.parametrize(
    "file, text, wanted",
    [("result", *x) for x in RESULTS.items()] + [("args", *x) for x in ARGS.items()],
    ids=lambda x: ascii(x)[:40],
)
def test_a_bad_folder_is_named_and_left_out(file, text, wanted, finished, tmp_path, capsys):
    finished("st-2", last=60.0)
    bad = finished(**{file: text})
    show(tmp_path)
    out, err = capsys.readouterr()
    assert "| st | 60.00 | 61.00 | 1 |" in out
    assert err.startswith("warning: ") and len(err) < 1000
    one_line(err.replace(str(bad), "", 1), *wanted)
    assert str(bad) in err


def copied(folder, finished):
    shutil.copytree(folder, folder.with_name("st-9"))
    return ["st-9", "args.json", "seed", 1]


def named_by_hand(folder, finished):
    folder.rename(folder.with_name("st-1 (copy)"))
    return ["st-1 (copy)"]


def aside(folder, finished):
    shutil.copytree(folder, folder.parent / "old" / "st-1")
    return [folder.parent / "old" / "st-1", "save_root"]


def twice(folder, finished):
    other = folder.parents[1] / "resnet20-resnet8-2" / "st-1"
    shutil.copytree(folder, other)
    args = json.loads((folder / "args.json").read_text())
    args["recipe"]["save_root"] = str(other.parent)
    (other / "args.json").write_text(json.dumps(args))
    return [other, folder]


def outside(folder, finished):
    shutil.copytree(folder, folder.parents[2] / "st-1")
    return [folder.parents[2] / "st-1"]


def without_args(folder, finished):
    (folder / "args.json").unlink()
    return [folder, "args.json"]


def a_pipe(folder, finished):
    (folder / "result.json").unlink()
    os.mkfifo(folder / "result.json")
    return [folder, "result.json"]


def too_large(folder, finished):
    os.truncate(folder / "result.json", tables_files.FEW + 1)
    return [folder, "result.json"]


def odd_name(folder, finished):
    home = folder.parents[1]
    shutil.copytree(home, home.with_name("digits\n\udce4|"))
    return ["digits\\n\\udce4|/resnet20-resnet8/st-1"]


@pytest.mark.parametrize(
    "change",
    [copied, named_by_hand, aside, twice, outside, without_args, a_pipe, too_large, odd_name],
)
def test_a_folder_that_was_moved_or_copied(change, finished, tmp_path, capsys):
    """It is named in a warning, the others are shown; a copy does not count as another seed."""
    wanted = change(finished(), finished)
    finished("kdsvd-2", last=60.0)
    show(tmp_path)
    out, err = capsys.readouterr()
    assert one_line(err, *wanted).startswith("warning: ")
    assert "| kdsvd | 60.00 | 61.00 | 1 |" in out and "| 2 |" not in out


def test_a_byte_order_mark_is_ignored(finished, tmp_path, capsys):
    folder = finished()
    for name in ("result.json", "args.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    show(tmp_path)
    out, err = capsys.readouterr()
    assert "| st | 50.00 | 51.00 | 1 |" in out and err == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(finished, tmp_path, capsys):
    finished("st-2", last=60.0)
    folder = finished()
    folder.chmod(0)
    show(tmp_path)
    folder.chmod(0o700)
    out, err = capsys.readouterr()
    assert "| st | 60.00" in out and "Permission denied" in err


def test_an_unreadable_folder_is_said(finished, tmp_path, capsys, monkeypatch):
    finished("st-2", last=60.0)
    bad = finished("at-1")
    walk = os.walk

    def refuse(where, onerror):
        for found in walk(where):
            if str(bad) == found[0]:
                onerror(PermissionError(13, "Permission denied", found[0]))
            else:
                yield found

    monkeypatch.setattr(os, "walk", refuse)
    show(tmp_path)
    out, err = capsys.readouterr()
    assert "| st | 60.00" in out and one_line(err, bad).startswith("warning: ")


def test_a_student_with_parts_of_the_teacher_is_in_its_pair(tmp_path):
    folder = tmp_path / "kdzoo" / "digits-1ep" / "resnet20-resnet8" / "simkd-1"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(dict(last=1.0, best=2.0, seconds=3.0)))
    args = dict(
        recipe=dict(data_name="digits", epochs=1, s_name="resnet8"),
        meta=dict(network="simkd:resnet8:64:64:2:8:8"),
        teacher=dict(network="resnet20"),
        machine="CPU",
        added=13_568,
    )
    (folder / "args.json").write_text(json.dumps(args))
    (found,) = tables_runs.collect(tmp_path, "kdzoo")
    assert [found[key] for key in ("teacher", "student", "mode", "added")] == [
        "resnet20",
        "resnet8",
        "simkd",
        13_568,
    ]


# --- the remembered records, also edited ----------------------------------------------------------


def test_records_outlive_their_runs(tmp_path):
    path = tmp_path / "x.csv"
    tables_runs.merge(path, [record(), record(seed=2, last=93.0)])
    again = tables_runs.merge(path, [record(last=94.0)])
    assert [(r["seed"], r["last"]) for r in again] == [(1, 94.0), (2, 93.0)]


@pytest.mark.parametrize(
    "text, last",
    [
        (f"{HEAD}\n{ROW}\n", "70.5"),
        (f"\ufeff{HEAD}\r\n{ROW}\r\n", "70.5"),
        (
            f"{HEAD};comment\n{ROW};mine".replace(".", "*").replace(",", ";").replace("*", ","),
            "70.5",
        ),
        (f"{HEAD}\n{ROW}\n".replace(",", "\t"), "70.5"),
        (f"{HEAD},,\n{ROW},,\n,,,,\n\n", "70.5"),
        (f"{HEAD},comment\n{ROW}\n", "70.5"),
        (f"{HEAD}\n{ROW}\n".replace("70.5", "70"), "70"),
        (f"{HEAD}\n{ROW}\n".replace(",1,2,", ",1.0,2.0,"), "70.5"),
    ],
)
def test_records_that_a_spreadsheet_saved(text, last, finished, tmp_path, capsys):
    finished()
    out = tmp_path / "out"
    out.mkdir()
    path = out / "small.runs.csv"
    path.write_text(text, encoding="utf-8", newline="")
    show(tmp_path, "--out", str(out))
    shown, err = capsys.readouterr()
    assert f"| at | {float(last):.2f} | 71.00 | 1 |" in shown and "| st | 50.00" in shown
    assert err == ""
    extra = "comment" in text
    lines = path.read_text().splitlines()
    assert lines[0] == HEAD + ",comment" * extra and len(lines) == 3
    assert lines[1] == ROW.replace("70.5", last) + extra * ",mine" * ("mine" in text) + (
        "," if extra and "mine" not in text else ""
    )


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("", ["protocol", "setting"]),
        (f"{HEAD}\n{ROW}".replace("last,", ""), ["last"]),
        (f"{HEAD}\n{ROW}\n{ROW}".replace("70.5", "many"), ["line 2", "last", "'many'"]),
        (f"{HEAD}\n{ROW}".replace("70.5", "705"), ["line 2", "last", "705"]),
        (f"{HEAD}\n{ROW}".replace("70.5", "nan"), ["line 2", "last", "'nan'"]),
        (f"{HEAD}\n{ROW}".replace("70.5", ""), ["line 2", "last", "''"]),
        (f"{HEAD}\n{ROW}".replace(",1,2,", ",one,2,"), ["line 2", "seed", "'one'"]),
        (f"{HEAD}\n{ROW}".replace(",1,2,", ",1.5,2,"), ["line 2", "seed", "1.5"]),
        (f"{HEAD}\n{ROW}".replace(",1,2,", f",{'9' * 5000},2,"), ["line 2", "seed", "'999*"]),
        (f"{HEAD}\n{ROW}".replace("resnet8", ""), ["line 2", "student", "''"]),
        (f"{HEAD}\n{ROW}\n\nkdzoo,x\n", ["line 4", "data", "''"]),
        (f"{HEAD}\n{ROW},more\n", ["line 2", "14", "13"]),
        (f"{HEAD},last\n{ROW},3\n", ["columns"]),
        (f'{HEAD}\n"kdzoo,x', []),
        (f'{HEAD}\n{ROW}\n"{"x" * 200_000}"', []),
        (f"{HEAD}\n{ROW}".encode("utf-16"), ["UTF-8"]),
        (b"\xe4" + f"{HEAD}\n{ROW}".encode(), ["UTF-8"]),
    ],
    ids=lambda x: ascii(x)[-30:],
)
@pytest.mark.parametrize("command", ["show", "run"])
def test_records_that_cannot_be_read_are_left(command, text, wanted, tmp_path, capsys, monkeypatch):
    """One line, before anything is trained; the file is not changed, since its records may exist
    nowhere else."""
    monkeypatch.setattr(tables_work, "launch", lambda *_: pytest.fail("a training was started"))
    monkeypatch.setattr(tables, "check", lambda _: None)
    path = tmp_path / "small.runs.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    more = [*DIGITS, "--methods", "baseline"] if command == "run" else []
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    with ends(capsys, path, *wanted) as said:
        tables.main([command, "small", *where, *more])
    assert len(said[0]) < 1000
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_records(finished, tmp_path, capsys, monkeypatch):
    finished()
    path = tmp_path / "small.runs.csv"
    path.write_text(f"{HEAD}\n{ROW}\n")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        show(tmp_path, "--out", str(tmp_path))
    assert stop.value.code == 2 and "No space left on device" in capsys.readouterr().err
    assert path.read_text() == f"{HEAD}\n{ROW}\n"


# --- at random ------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 3)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["resnet8", "resnet20", "digits", "st", "CPU", "st-1", "10" * 200]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
CELLS = st.text(max_size=6) | st.sampled_from(
    [*ROW.split(","), *HEAD.split(","), "70,5", "1e3", "1e999", "-1", "nan", '"', '""', "\r", "\n"]
)


@st.composite
def changed(draw, good: dict):
    """The bytes of a JSON object with some values replaced or removed, then perhaps cut or with
    flipped bits."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(0, 2))):
        part = value
        inner = [part, *(x for x in part.values() if isinstance(x, dict))]
        part = draw(st.sampled_from(inner))
        key = draw(st.sampled_from([*part, "more"]))
        part[key] = draw(VALUES)
        if draw(st.booleans()) and draw(st.booleans()):
            del part[key]
    return draw(spoilt(json.dumps(value).encode()))


@st.composite
def spoilt(draw, good: bytes):
    data = bytearray(good)
    if draw(st.integers(0, 2)) == 0:
        for _ in range(draw(st.integers(0, 3))):
            if data:
                data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
        data = data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data
        data = draw(st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00"])) + bytes(data)
    return bytes(data)


@st.composite
def sheets(draw):
    cut = draw(st.sampled_from([",", ";", "\t", "|"]))
    rows = [HEAD.split(","), *draw(st.lists(st.just(ROW.split(",")), min_size=1, max_size=3))]
    rows = [list(row) for row in rows]
    for _ in range(draw(st.integers(0, 2))):
        row = draw(st.sampled_from(rows))
        place = draw(st.integers(0, len(row)))
        row[place : place + draw(st.integers(0, 1))] = draw(st.lists(CELLS, max_size=2))
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    text = end.join(cut.join(row) for row in rows)
    return draw(spoilt(text.encode("utf-8", "surrogatepass")))


@pytest.mark.slow
def test_random_files(finished, tmp_path, capsys, monkeypatch, request):
    """For any content of the files, `show` never ends in a traceback: it shows the table, or
    prints one line about the error. With --soak, 2000 examples."""
    finished("at-2", last=60.0)
    bad = finished()
    result, args = (json.loads((bad / f"{x}.json").read_text()) for x in ("result", "args"))
    out, shown = tmp_path / "out", []
    monkeypatch.setattr(tables, "draw", lambda *_: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)

    @settings(
        max_examples=2000 if request.config.getoption("--soak") else 200,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        changed(result) | st.just(json.dumps(result).encode()),
        changed(args) | st.just(json.dumps(args).encode()),
        st.none() | sheets(),
    )
    def check(result, args, sheet):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (bad / "result.json").write_bytes(result)
        (bad / "args.json").write_bytes(args)
        path = out / "small.runs.csv"
        if sheet is not None:
            path.write_bytes(sheet)
        try:
            show(tmp_path, "--out", str(out))
        except SystemExit as stop:
            err = capsys.readouterr().err
            assert stop.code == 2 and sheet is not None and path.read_bytes() == sheet
            assert err.count("error: ") == 1
            return
        text, err = capsys.readouterr()
        assert "| at | 60.00 | 61.00 |" in text or sheet is not None
        assert err.count("\n") <= 1 and len(err) < 1000
        shown.append(err == "")
        tables_runs.remembered(path)  # it can read the file that it wrote

    check()
    assert 0.05 < sum(shown) / len(shown) < 0.95  # both kinds are there

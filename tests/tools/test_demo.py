import csv

import pytest

from tools import demo


@pytest.mark.soak
def test_demo(tmp_path, capsys):
    """The whole demo, with one epoch per run. A second demo gets a new folder."""
    for name in ("demo", "demo-2"):
        root = demo.main(["--epochs", "1", "--save_root", str(tmp_path)])
        assert root == tmp_path / name
    with open(root / "comparison.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = ["teacher (resnet20)", "baseline (resnet8)", *demo.MODES]
    assert [row["run"] for row in rows] == names
    assert all(0 < float(row["last_top1"]) <= float(row["best_top1"]) <= 100 for row in rows)
    assert (root / "comparison.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert f"figure: {root / 'comparison.png'}" in out and all(name in out for name in names)

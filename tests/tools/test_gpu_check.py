"""tools/gpu_check.sh at small sizes, also without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.soak
def test_every_part_runs_and_is_summed_up(tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("test", 8)):
        for name in "ab":
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    out = tmp_path / "out"
    env = dict(
        os.environ,
        OUT=str(out),
        IMAGES=str(tmp_path / "images"),
        PYTHON=sys.executable,
        MODES="st,at,bss",
        JOBS="2",
        TEST_JOBS="1",
        PARTS="steps runs epoch students rows",
        SECONDS_RUNS="200",  # other tests may run at the same time
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    done = subprocess.run(
        ["bash", "tools/gpu_check.sh", "--tiny"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(x) for x in (out / "steps.jsonl").read_text().splitlines()]
    assert {row["mode"] for row in rows if "mode" in row} >= {"st", "at", "bss"}
    assert not any("error" in row for row in rows), rows
    assert json.loads((out / "runs.json").read_text()) == dict(count=3, failed={})
    rows = [json.loads(x) for x in (out / "students.jsonl").read_text().splitlines()]
    assert [row["students"] for row in rows] == [1, 4]
    text = (out / "summary.md").read_text()
    assert "st" in text and "images" in text

"""Training on CUDA without a GPU: a stand-in for the CUDA runtime counts copies, synchronisations
and kernels, and runs none. Only with --soak; skipped where that stand-in is not next to the
repository.

FAKE_CUDA names it; started by it, this file trains the methods that it is given.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median_high

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the stand-in starts this file
FAKE = Path(os.environ.get("FAKE_CUDA", ROOT.parent / "shared" / "fake_cuda" / "run"))
PARTS = 6
TEACHER = "base-off/initial_r14.pth.tar"  # from before the first step: its weights are finite
# what a step must not do; a read of the loss for the log is outside the step
WAITS = ("h2d_pageable", "d2h_pinned", "d2h_pageable", "stream_sync", "device_sync")
# wait by design: their rows say that they cannot be captured
WAITING = {"bss": "the attack looks at its images", "kdsvd": "eigenvectors are found step by step"}

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not FAKE.exists(), reason="no stand-in for CUDA: set FAKE_CUDA"),
]


def run(script, *argv) -> str:
    """What a script logs."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        script.main([str(x) for x in argv])
    return log.getvalue()


def train(mode: str, root: Path, amp: str, graph: int, *more: str) -> dict:
    """Two epochs of `mode`. Returns what its steps counted, and whether they were captured."""
    import train_kd
    from tools.bench_kernels import counts

    choose, found = train_kd.choose_step, {}

    def choose_counted(*args):
        step = choose(*args)

        def counted(distiller, phase, optimizer, batch, *args):
            before = counts()
            terms = step(distiller, phase, optimizer, batch, *args)
            after = counts()
            if len(batch.img) == 32:
                count = {name: after[name] - before[name] for name in after}
                found.setdefault(phase.name, []).append(count)
            return terms

        return counted

    train_kd.choose_step = choose_counted
    before = counts()
    try:
        log = run(
            train_kd,
            *("--kd_mode", mode, "--t_model", root / TEACHER),
            *("--s_name", "resnet8", "--epochs", 2, "--batch_size", 32, "--print_freq", 1000),
            *("--amp", amp, "--cuda_graph", graph, "--save_root", root),
            *("--note", f"{mode}-{amp}-{graph}{''.join(more)}", *more),
        )
    finally:
        train_kd.choose_step = choose
    after = counts()
    # at first libraries choose kernels and the optimizer makes its state; torch waits before it
    # captures, as it does again after a learning rate or a weight has changed
    steady = [[step for step in steps[5:] if not step["captures"]] for steps in found.values()]
    kernels = [median_high(step["kernels"] + step["library"] for step in x) for x in steady if x]
    return dict(
        mode=mode,
        amp=amp,
        graph=graph,
        kernels=max(kernels),
        waits=max(sum(step[name] for name in WAITS) for x in steady for step in x),
        captured="captured as a CUDA graph" in log and "not captured" not in log,
        replays=after["replays"] - before["replays"],
        illegal=after["illegal"] - before["illegal"],
        escaped=after["escaped"] - before["escaped"],
    )


def main(root: Path, part: int) -> None:
    import engine.run
    import train_base
    from kd_losses import METHODS
    from tools import eval as eval_tool
    from tools.bench_kernels import decide

    decide()
    engine.run.check_finite = lambda *args: None  # values are whatever the memory held
    data = ["--data_name", "digits", "--img_size", "12", "--batch_size", "32"]
    for amp in ("bf16", "fp16", "off"):
        out = [*data, "--amp", amp, "--save_root", root, "--epochs", 2]
        run(train_base, "--net_name", "resnet14", *out, "--note", f"base-{amp}")
    run(eval_tool, root / TEACHER)
    for mode in list(METHODS)[part::PARTS]:
        for amp in ("bf16", "off"):
            for graph in (0, 1) if METHODS[mode].capturable else (0,):
                print(json.dumps(train(mode, root, amp, graph)), flush=True)
    print(json.dumps(train("st", root, "fp16", 1)), flush=True)
    print(json.dumps(train("st+at", root, "bf16", 1, "--accumulate", "2")), flush=True)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_method_trains_on_cuda(part, tmp_path):
    """Without a crash, an illegal call while capturing, or a wait in a step."""
    command = [FAKE, sys.executable, __file__, tmp_path, str(part)]
    done = subprocess.run(
        [str(x) for x in command],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) > 20
    for row in rows:
        assert row["illegal"] == row["escaped"] == 0, row
        assert row["captured"] == bool(row["graph"]) and bool(row["replays"]) == row["captured"], (
            row
        )
        assert row["waits"] == 0 or row["mode"] in WAITING, row


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""Every method on one small problem, from the same initial weights: a scoreboard, not a published table.

    python tools/scoreboard.py --img_root datasets/cifar10_jpeg_10k --t_model runs/.../model_best.pth.tar

Trains the baseline and each method (`--modes`) for each of `--seeds`, `--workers` at a time with one
thread each, skips what is done already, and writes scoreboard.csv and scoreboard.png into `--out`.
"""

import argparse
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402
from kd_losses import METHODS  # noqa: E402

BASE = "baseline"


def run(args, mode: str, seed: int) -> None:
    """Train one entry in a process of its own, unless it is there already."""
    note = f"{mode}-{seed}"
    common = ["--save_root", args.runs, "--note", note, "--seed", str(seed), "--cuda", args.cuda]
    common += ["--epochs", str(args.epochs), "--img_root", args.img_root, *args.rest]
    if mode == BASE:
        data = ["--data_name", "imagefolder", "--mean_std", "cifar10"]
        command = ["train_base.py", "--net_name", args.s_name, *data]
    else:
        start = next(Path(args.runs, f"{BASE}-{seed}").glob("initial_*.pth.tar"))
        command = [
            "train_kd.py",
            "--kd_mode",
            mode,
            "--t_model",
            args.t_model,
            "--s_init",
            str(start),
        ]
    if (Path(args.runs) / note / "curves.png").exists():
        return
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *command[1:], *common],
        env=env,
        capture_output=True,
        text=True,
    )
    last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
    print(f"{note:<14}", *last, flush=True)


def result(folder: Path) -> dict:
    """Last and best accuracy and seconds of a run."""
    rows = [row for row in utils.read_metrics(folder) if "test_top1" in row]
    with open(folder / "timing.csv", encoding="utf-8") as file:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
    # the first phase of some methods leaves the classifier as it was: no epoch to choose
    scores = [row["test_top1"] for row in rows if row.get("phase") != "init"]
    return dict(last=scores[-1], best=max(scores), seconds=seconds)


def collect(args, modes: list[str]) -> list[dict]:
    """A row for each mode with what is there of its seeds."""
    table = []
    for mode in modes:
        folders = {seed: Path(args.runs) / f"{mode}-{seed}" for seed in args.seeds}
        done = {seed: f for seed, f in folders.items() if (f / "curves.png").exists()}
        found = {seed: result(folder) for seed, folder in done.items()}
        if found:
            last = [r["last"] for r in found.values()]
            table.append(
                dict(
                    mode=mode,
                    seeds=len(found),
                    last_mean=round(mean(last), 2),
                    last_min=min(last),
                    last_max=max(last),
                    best_mean=round(mean(r["best"] for r in found.values()), 2),
                    seconds=round(mean(r["seconds"] for r in found.values())),
                )
            )
    return table


def draw(table: list[dict], path: Path, title: str) -> None:
    """Last accuracy of every method, its range over the seeds, against the baseline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.5), layout="constrained")
    axis = figure.subplots()
    rows = sorted(table, key=lambda row: row["last_mean"])
    for i, row in enumerate(rows):
        color = "tab:orange" if row["mode"] == BASE else "tab:blue"
        axis.plot([row["last_min"], row["last_max"]], [i, i], color=color, alpha=0.5, linewidth=4)
        axis.plot(row["last_mean"], i, "o", color=color)
        if row["mode"] == BASE:
            axis.axvspan(row["last_min"], row["last_max"], color=color, alpha=0.12)
    axis.set_yticks(range(len(rows)), [f"{row['mode']} ({row['seeds']})" for row in rows])
    axis.set(
        xlabel="test top-1 of the last epoch (%), mean and range (number of seeds)", title=title
    )
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--img_root", required=True)
    parser.add_argument("--t_model", required=True)
    parser.add_argument("--s_name", default="resnet8")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[2])
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cuda", default="0")
    parser.add_argument("--runs", default="runs/scoreboard")
    parser.add_argument("--out", type=Path, default=Path("runs/scoreboard"))
    parser.add_argument("--title", default="")
    # flags that are not ours go to the training scripts, which refuse what they do not know
    args, args.rest = parser.parse_known_args(argv)
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda seed: run(args, BASE, seed), args.seeds))
        jobs = [(mode, seed) for seed in args.seeds for mode in args.modes]
        list(pool.map(lambda job: run(args, *job), jobs))
    table = collect(args, [BASE, *METHODS])
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "scoreboard.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    draw(table, args.out / "scoreboard.png", args.title)
    for row in table:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()

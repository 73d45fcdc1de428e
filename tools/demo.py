"""A demo of about three minutes, offline: a teacher, a baseline and six distilled students.

    python tools/demo.py            (or `make demo`, which installs the packages first)

Trains on scikit-learn's handwritten digits: a resnet20 teacher, a resnet8 baseline, and resnet8
students, distilled by six methods from the initial weights of the baseline. Prints a table and the
path of a figure.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_base  # noqa: E402
import train_kd  # noqa: E402
from engine.run import draw_curves  # noqa: E402

MODES = ("st", "at", "pkt", "vid", "crd", "dml")


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--epochs", type=int, default=10, metavar="N", help="epochs of each run (default 10)"
    )
    parser.add_argument(
        "--save_root",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="folder in which the folder of the demo is made (default runs)",
    )
    args = parser.parse_args(argv)
    root = next(
        path
        for i in range(1, 10**6)
        if not (path := args.save_root / ("demo" if i == 1 else f"demo-{i}")).exists()
    )
    # small batches: with 1297 images, ten epochs would be too few steps otherwise
    recipe = ["--save_root", str(root), "--batch_size", "32", "--lr", "0.05"]
    recipe += ["--epochs", str(args.epochs)]
    began = time.perf_counter()

    def title(text: str) -> None:
        print(f"\n--- {text} ({time.perf_counter() - began:.0f} s so far)", flush=True)

    results = {}
    for note, name in (("teacher", "resnet20"), ("baseline", "resnet8")):
        title(f"{note}: {name}, trained without a teacher")
        argv = ["--data_name", "digits", "--net_name", name, "--note", note]
        results[f"{note} ({name})"] = train_base.main([*recipe, *argv])
    files = ["--t_model", f"{root}/teacher/model_best.pth.tar"]
    files += ["--s_init", f"{root}/baseline/initial_r8.pth.tar"]
    for i, mode in enumerate(MODES, 1):
        title(f"{i} of {len(MODES)}: --kd_mode {mode}")
        results[mode] = train_kd.main([*recipe, *files, "--kd_mode", mode, "--note", mode])

    print(f"\n{'run':<20} {'last top-1':>10} {'best top-1':>10} {'seconds':>8}")
    with open(root / "comparison.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["run", "last_top1", "best_top1", "seconds"])
        for name, run in results.items():
            print(f"{name:<20} {run['last']:>10.2f} {run['best']:>10.2f} {run['seconds']:>8.1f}")
            table.writerow(
                [name, f"{run['last']:.2f}", f"{run['best']:.2f}", f"{run['seconds']:.1f}"]
            )
    figure = root / "comparison.png"
    drawn = draw_curves([run["dir"] for run in results.values()], figure, list(results))
    print(f"\n{time.perf_counter() - began:.0f} s in total; best is chosen on the test set")
    print(f"figure: {figure}" if drawn else f"table: {root / 'comparison.csv'}")
    return root


if __name__ == "__main__":
    main()

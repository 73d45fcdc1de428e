"""CSV, figure and this folder's table from the runs' metrics: python results/scoreboard/table.py"""

import csv
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
last, best = {}, {}
for path in sorted((HERE / "metrics").glob("*.csv")):
    mode, *variant, _ = path.stem.split("-")
    if not variant:  # the others are for looking into what ends low
        rows = csv.DictReader(open(path, encoding="utf-8"))
        tops = [float(row["test_top1"]) for row in rows if row["test_top1"]]
        last.setdefault(mode, []).append(tops[-1])
        best.setdefault(mode, []).append(max(tops))
modes = sorted(last, key=lambda mode: -mean(last[mode]))

with open(HERE / "scoreboard.csv", "w", encoding="utf-8", newline="\n") as file:
    print("mode,seeds,last_mean,last_min,last_max,best_mean", file=file)
    for mode in modes:
        figures = mean(last[mode]), min(last[mode]), max(last[mode]), mean(best[mode])
        print(mode, len(last[mode]), *(f"{x:.2f}" for x in figures), sep=",", file=file)

print("| mode | seeds | last top-1 | range | best |\n| --- | --- | --- | --- | --- |")
for mode in modes:
    name = "**baseline**" if mode == "baseline" else f"`{mode}`"
    several = f"{min(last[mode]):.2f} to {max(last[mode]):.2f}" if len(last[mode]) > 1 else ""
    cells = len(last[mode]), f"{mean(last[mode]):.2f}", several, f"{mean(best[mode]):.2f}"
    print("|", " | ".join(map(str, (name, *cells))), "|")

figure, axis = plt.subplots(figsize=(7.8, 1 + 0.2 * len(modes)))
axis.axvspan(min(last["baseline"]), max(last["baseline"]), color="C1", alpha=0.12, linewidth=0)
for place, mode in enumerate(reversed(modes)):
    color = "C1" if mode == "baseline" else "C0"
    axis.plot([min(last[mode]), max(last[mode])], [place] * 2, color=color, alpha=0.5, linewidth=4)
    axis.plot(mean(last[mode]), place, "o", color=color, markersize=6)
axis.set_yticks(range(len(modes)), [f"{m} ({len(last[m])})" for m in reversed(modes)], fontsize=9)
axis.set_ylim(-1, len(modes))
axis.grid(axis="x", color="0.9")
axis.set_title("resnet20 -> resnet8, CIFAR-10 (JPEG), 10 000 images, 10 epochs", fontsize=11)
axis.set_xlabel("test top-1 of the last epoch (%), mean and range (number of seeds)")
figure.tight_layout()
figure.savefig(HERE / "scoreboard.png", dpi=100)

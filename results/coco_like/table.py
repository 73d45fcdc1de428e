"""The table of this folder's README, from the runs' metrics: python results/coco_like/table.py"""

import csv
from pathlib import Path
from statistics import mean

FIGURES = "AP", "AP50", "AP75", "APs", "APm"
print(f"| | seed | steps | {' | '.join(FIGURES)} | AP50 at each quarter |")
print("| --- " * (4 + len(FIGURES)) + "|")
runs = {}
for mode in ("teacher", "none", "reviewkd", "dkd", "reviewdkd"):
    for seed in ("",) if mode == "teacher" else ("1", "2"):
        path = Path(__file__).parent / "metrics" / f"{mode}{seed and '-'}{seed}.csv"
        rows = list(csv.DictReader(open(path, encoding="utf-8")))
        last, quarter = rows[-1], len(rows) // 4
        runs.setdefault(mode, []).append(float(last["AP"]))
        cells = [f"{float(last[x]):.1f}" for x in FIGURES]
        rise = ", ".join(f"{float(row['AP50']):.1f}" for row in rows[quarter - 1 :: quarter])
        print(f"| `{mode}` | {seed or 2} | {last['step']} | {' | '.join(cells)} | {rise} |")
means = ", ".join(f"`{m}` {mean(x):.1f}" for m, x in runs.items() if m != "teacher")
print(f"\nMean AP of the two seeds: {means}.")

"""Showing a table: our figures next to the published ones, as rows, Markdown and a figure."""

from pathlib import Path
from statistics import mean, stdev

import utils
from engine import published
from engine.run import import_matplotlib
from kd_losses import METHODS
from tools.tables_plan import BASE, TABLES, figures_of, short
from tools.tables_runs import VALIDATED
from utils import UserError

COLUMNS = (
    "setting data epochs teacher student mode method metric seeds last_mean last_std best_mean "
    "best_std published reported budget difference added seconds precision source also note"
)


# --- rows -----------------------------------------------------------------------------------------


def summarise(name: str, records: list[dict]) -> list[dict]:
    """The rows of the table, in blocks by setting and pair: our figures next to the published ones.
    The published block also has the figures of rows that were not run."""
    table, figures = TABLES[name], figures_of(name)
    full = published.PROTOCOLS[table.protocol].epochs if table.protocol else None
    pairs = dict.fromkeys((t, s) for t, s, _ in table.rows)
    pairs |= dict.fromkeys((f["teacher"], f["student"]) for f in figures if f["teacher"])
    # (where, data, epochs) -> whether it is the published setting: no other size, no validation set
    settings = {
        (r["setting"], r["data"], r["epochs"]): r["data"] in table.data
        and r["setting"].startswith(f"{r['data']}-{full}ep")
        and not r["setting"].endswith(VALIDATED)
        for r in records
    }
    there = {data for (_, data, _), own in settings.items() if own}
    settings |= {("published", data, full): True for data in table.data if data not in there}
    rows = []
    for (where, data, epochs), own in settings.items():
        what = where, data, epochs
        mine = [r for r in records if (r["setting"], r["data"], r["epochs"]) == what]
        theirs = [f for f in figures if own and f["data"] == data]
        found = [row for pair in pairs for row in block(*what, pair, mine, theirs)]
        rows += found or [row for pair in pairs for row in block(*what, pair, mine, theirs, True)]
    return rows


def block(
    where: str, data: str, epochs: int, pair: tuple, records: list, figures: list, bare=False
) -> list[dict]:
    """The rows of one pair under one setting. Without `bare`: [] if no student was distilled."""
    lines = {}  # (mode or method, metric) -> our runs, published figures
    for side, items in enumerate((records, figures)):
        for item in items:
            for mode in roles(item, *pair):
                key = mode or item["method"], item.get("metric", "top1")
                lines.setdefault(key, ([], []))[side].append(item)
    if not bare and all(key[0].startswith(("teacher", BASE)) for key in lines):
        return []
    # first teacher and baseline, then the order of the published table, then ours
    order = [key for key, line in lines.items() if line[1]]
    order += [(mode, "top1") for mode in METHODS if (mode, "top1") in lines]
    order += list(lines)
    first = [("teacher", "top1"), (BASE, "top1")]
    columns = dict.fromkeys(COLUMNS.split(), "")
    rows = []
    for key in sorted(lines, key=[*first, *order].index):
        runs, same = lines[key]
        row = columns | dict(setting=where, data=data, epochs=epochs, mode=key[0], metric=key[1])
        row |= dict(teacher=pair[0], student=pair[1], method=key[0])
        if runs:
            row |= dict(seeds=len(runs), added=runs[0]["added"])
            for what in ("last", "best"):
                values = [r[what] for r in runs]
                row[f"{what}_mean"] = round(mean(values), 2)
                row[f"{what}_std"] = round(stdev(values), 2) if len(values) > 1 else ""
            row["seconds"] = round(mean(r["seconds"] for r in runs))
            row["precision"] = "+".join(sorted({r["precision"] for r in runs}))
        if same:
            row |= beside(same)
        if key[0] == "teacher":
            row["method"] = "teacher"
        ours = row.get(f"{row['reported']}_mean")  # of the epoch that the source reports
        if runs and same and same[0]["value"] != "N/A" and ours is not None:
            row["difference"] = round(ours - float(row["published"]), 2)
        rows.append(row)
    return rows


def roles(item: dict, t: str, s: str) -> list[str]:
    """The modes of the rows, in the block of a pair, to which a run or a figure belongs."""
    if item["mode"] == BASE:
        return [BASE] * (item["student"] == s) + ["teacher"] * (item["student"] == t != s)
    return [item["mode"]] * ((item["teacher"], item["student"]) == (t, s))


def beside(same: list[dict]) -> dict:
    """The published figures of a row: that of the first source, and others in `also`."""
    first, *others = same
    also = "; ".join(f"{f['value']} ({f['method']}, {f['source']})" for f in others)
    return dict(
        method=first["method"],
        metric=first["metric"],
        published=first["value"],
        reported=first["epoch"],
        budget=first["budget"],
        source=first["source"],
        also=also,
        note=first["note"],
    )


# --- Markdown -------------------------------------------------------------------------------------


def markdown(name: str, rows: list[dict]) -> str:
    """The table as Markdown, with a part for each setting and pair."""
    table = TABLES[name]
    full = published.PROTOCOLS[table.protocol].epochs if table.protocol else None
    text = [f"**{table.title}**"]
    for (where, data, t, s), part in parts_of(rows).items():
        ours = any(r["seeds"] for r in part)
        title = f"{short(t)} -> {short(s)}, {data if where == 'published' else where}"
        if not ours:
            title += ": published, not run here"
        elif not any(r["published"] for r in part):
            title += f": {part[0]['epochs']} epochs (the protocol has {full})"
            title += ", not a published setting" if table.data else ""
        theirs = any(r["published"] for r in part)
        text += [title, *lines_of(part, ours, theirs)]
        text += [f"{r['method']}: {r['note']}" for r in part if r["note"]]
    return "\n\n".join(_paragraphs(text)) + "\n"


def lines_of(part: list[dict], ours: bool, theirs: bool) -> list[str]:
    """A block as a Markdown table, without empty columns."""
    head = ["method"]
    head += ["last epoch", "best epoch", "seeds"] if ours else []
    head += ["published", "its epoch"] if theirs else []
    head += ["their budget"] if any(r["budget"] for r in part) else []
    head += ["difference"] if ours and theirs else []
    head += ["added parameters", "seconds"] if ours else []
    head += ["others"] if any(r["also"] for r in part) else []
    lines = [head, ["---"] * len(head)]
    for r in part:
        cells = dict(r, method=r["method"] + ("" if r["metric"] == "top1" else f" ({r['metric']})"))
        cells |= {f"{what} epoch": spread(r, what) for what in ("last", "best")}
        cells |= {"its epoch": r["reported"], "added parameters": r["added"], "others": r["also"]}
        cells["their budget"] = r["budget"]
        cells["difference"] = f"{r['difference']:+.2f}" if r["difference"] != "" else ""
        lines.append([str(cells[name]).replace("|", r"\|") for name in head])
    return ["| " + " | ".join(line) + " |" for line in lines]


def parts_of(rows: list[dict]) -> dict:
    """{(setting, data, teacher, student): the rows of the block}."""
    parts = {}
    for row in rows:
        place = row["setting"], row["data"], row["teacher"], row["student"]
        parts.setdefault(place, []).append(row)
    return parts


def _paragraphs(lines: list[str]) -> list[str]:
    """The lines, with the lines of a table joined to one paragraph."""
    blocks = []
    for line in lines:
        if line.startswith("|") and blocks and blocks[-1].startswith("|"):
            blocks[-1] += "\n" + line
        else:
            blocks.append(line)
    return blocks


def spread(row: dict, what: str) -> str:
    """Mean and standard deviation of the last or best epoch of a row, as text."""
    if not row["seeds"]:
        return ""
    deviation = row[f"{what}_std"]
    return f"{row[f'{what}_mean']:.2f}" + (f" ± {deviation:.2f}" if deviation != "" else "")


# --- a figure -------------------------------------------------------------------------------------


def draw(rows: list[dict], path: Path, title: str) -> bool:
    """Draw our figures (dots: last epoch, with standard deviation; circles: best epoch) and the
    published ones (crosses). Returns whether a figure was drawn."""
    if import_matplotlib() is None:
        print("no figure drawn, since matplotlib is not installed; run pip install matplotlib")
        return False
    from matplotlib.figure import Figure

    parts = parts_of(r for r in rows if r["metric"] == "top1" and r["published"] != "N/A")
    if not parts:
        return False
    columns = min(3, len(parts))
    lines = -(-len(parts) // columns)
    tallest = max(len(part) for part in parts.values())
    width, height = max(6.4, 4.6 * columns), lines * (1.2 + 0.24 * tallest) + 0.4
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, ((where, data, t, s), part) in zip(axes, parts.items()):
        part = part[::-1]
        for i, row in enumerate(part):
            if row["seeds"]:
                deviation = row["last_std"] or 0
                axis.errorbar(row["last_mean"], i, xerr=deviation, fmt="o", color="tab:blue")
                axis.plot(row["best_mean"], i, "o", mfc="none", color="tab:blue")
            if row["published"]:
                axis.plot(float(row["published"]), i, "x", color="tab:orange")
        axis.set_yticks(range(len(part)), [row["method"] for row in part], fontsize=8)
        what = (data if where == "published" else where).replace("$", r"\$")  # no LaTeX formula
        axis.set_title(f"{short(t)} -> {short(s)}, {what}", fontsize=9)
        axis.set_xlabel("test top-1 (%)", fontsize=8)
        axis.grid(alpha=0.3, axis="x")
    for axis in list(axes):
        axis.set_axis_off()
    crosses = ", published (crosses)" if any(row["published"] for row in rows) else ""
    figure.suptitle(f"{title}\nlast epoch (dots), best (circles){crosses}", fontsize=10)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:  # ValueError: too many pixels
        raise UserError(f"{path} cannot be written ({utils.first_line(error)})") from error
    return True

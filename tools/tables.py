"""Reproduce a published table with one command, and show it with the published figures.

    python tools/tables.py list
    python tools/tables.py run kdzoo-r20-r20 --data cifar10 --methods baseline,st,at --seeds 3
    python tools/tables.py show kdzoo-r20-r20
    python tools/tables.py status kdzoo-r20-r20

`list` prints the names of the tables. `run` trains the missing teacher, then every method and seed.
It skips finished trainings, resumes interrupted ones, waits for those of other processes, and
continues with the others if one fails. `--launcher slurm` submits the trainings to a cluster.
`--dry_run` prints the commands and their recipes. `status` lists finished, running, queued and
failed trainings. `show` prints the accuracy of the last and the best epoch, mean and standard
deviation over the seeds, next to the figures of published.csv. Runs with other data, epochs or
precision are in separate tables.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dataset  # noqa: E402
from engine import cli, console  # noqa: E402
from engine.checkpoint import find_weights  # noqa: E402
from tools.tables_files import insert, split_page, write, write_csv  # noqa: E402
from tools.tables_plan import (  # noqa: E402
    BASE,
    TABLES,
    check,
    figures_of,
    jobs_of,
    rows_of,
    same_images,
    setting,
)
from tools.tables_runs import collect, merge, remembered  # noqa: E402
from tools.tables_show import draw, markdown, summarise  # noqa: E402
from tools import tables_slurm, tables_status  # noqa: E402
from tools.tables_work import work  # noqa: E402
from utils import UserError  # noqa: E402


def run(args: argparse.Namespace) -> None:
    """Run the missing trainings of a table, then show the table."""
    table = TABLES[args.table]
    if table.protocol is None:
        raise UserError(f"{args.table} cannot be run, since it has no recipe; use `show`")
    args.data = args.data or (table.data[0] if table.data else None)
    if args.data is None:
        raise UserError(f"--data is required for {args.table}; give {cli.DATA_NAMES}")
    if args.data in ("imagefolder", "wds") and not args.img_root:
        what = "the folder of the images" if args.data != "wds" else "the shards"
        raise UserError(f"--img_root is required for --data {args.data}; give {what}")
    tables_slurm.check(args)
    check_places(args)
    rows = rows_of(args.table, args.data, args.pairs, args.methods)
    if args.teacher:
        knows = find_weights(None, args.teacher, "t_name", "teacher").name
        others = {t for t, _, mode in rows if mode != BASE} - {knows}
        if others:
            raise UserError(
                f"--teacher {args.teacher} is a {knows}, but the table needs {', '.join(others)}; "
                "choose fitting pairs with --pairs"
            )
    jobs = jobs_of(args, table, rows)
    if args.dry_run:
        for job in jobs:
            print(f"# {job.recipe}\n{job}")
        return
    if args.data == "imagenet":
        same_images(Path(args.runs) / table.protocol / setting(args, table), args.img_root)
    todo = [job for job in jobs if not job.finished]
    print(f"{len(jobs)} trainings, {len(jobs) - len(todo)} of them finished", flush=True)
    if todo:
        check(todo[0])
    if args.out:  # report a folder that is not writable before training
        make_folder(Path(args.out))
        remembered(Path(args.out) / f"{args.table}.runs.csv")
    if args.launcher == "slurm":
        tables_slurm.submit(args, todo, jobs)
        return
    places = {str(job.folder): dict(epochs=job.epochs) for job in jobs}
    tables_status.remember(Path(args.runs), args.table, places)
    failed = work(todo, jobs, args.jobs, args.cuda, not args.apart)
    show(args)
    if failed:
        raise UserError(f"{len(failed)} of {len(todo)} trainings failed; see their errors above")


def show(args: argparse.Namespace) -> None:
    """Print a table, and write it into --out and --into."""
    check_places(args)
    table = TABLES[args.table]
    records = collect(Path(args.runs), table.protocol) if table.protocol else []
    out = Path(args.out) if args.out else None
    if out:
        make_folder(out)
        records = merge(out / f"{args.table}.runs.csv", records)
    rows = summarise(args.table, records)
    if not rows:
        raise UserError(
            f"{args.table}: nothing to show, no finished runs in {args.runs} and no published "
            "figures; use `run` first"
        )
    text = markdown(args.table, rows)
    if out:
        write_csv(out / f"{args.table}.csv", rows)
        write(out / f"{args.table}.md", text)
        draw(rows, out / f"{args.table}.png", table.title)
    if args.into:
        insert(Path(args.into), args.table, text)
    print(text)


def status(args: argparse.Namespace) -> None:
    """Print the state of each training of a table."""
    cli.usable_folder(Path(args.runs), "--runs", write=False)
    print("\n".join(tables_status.status(Path(args.runs), args.table)))


def overview(args: argparse.Namespace) -> None:
    """Print a line for every table."""
    print("table             protocol  pairs  published  methods")
    for name, table in TABLES.items():
        figures = figures_of(name)
        rows = rows_of(name, next(iter(table.data), ""), None, None)
        pairs = len({row[:2] for row in rows if row[0]})
        modes = ",".join(dict.fromkeys(mode for *_, mode in rows)) or "-"
        print(f"{name:<17} {table.protocol or '-':<10}{pairs:>5}  {len(figures):>9}  {modes}")


# --- output files ---------------------------------------------------------------------------------


def check_places(args: argparse.Namespace) -> None:
    """Raise UserError for a wrong --runs, --out or --into, before writing or training."""
    runs, out = Path(args.runs), Path(args.out) if args.out else None
    cli.usable_folder(runs, "--runs", write=args.command == "run")
    if out:
        cli.usable_folder(out, "--out")
        for kind in ("runs.csv", "csv", "md", "png"):
            if (out / f"{args.table}.{kind}").is_dir():
                raise UserError(
                    f"--out {out}: {args.table}.{kind} in it is a folder; give another folder"
                )
    if args.into:
        split_page(Path(args.into), args.table)


def make_folder(path: Path) -> None:
    """Make the folder if it does not exist, and check that it is writable."""
    probe = path / f".{os.getpid()}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror})") from error


# --- the command ----------------------------------------------------------------------------------

COMMANDS = dict(list=overview, run=run, show=show, status=status)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command and its flags."""
    first = cli.Parser(prog="tables.py", description=__doc__)
    first.add_argument("command", choices=COMMANDS, help="COMMAND --help lists its flags")
    command = first.parse_args(argv[:1]).command
    parser = cli.Parser(prog=f"tables.py {command}")
    parser.set_defaults(command=command)
    add = parser.add_argument
    if command != "list":
        add("table", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
        folder = dict(type=cli.filled, metavar="DIR")
        runs = "folder of the runs (default runs/tables)"
        add("--runs", default="runs/tables", **folder, help=runs)
    if command in ("run", "show"):
        add("--out", **folder, help="also write the table as CSV, Markdown and figure there")
        page = dict(type=cli.filled, metavar="FILE")
        add("--into", **page, help="also write the table into this page, between its two marks")
    if command == "run":
        methods = "methods to train, also 'baseline' (default: all of the table)"
        add("--methods", type=cli.comma(str), metavar="M,M", help=methods)
        pairs = "pairs of networks, TEACHER-STUDENT (default: all of the table)"
        add("--pairs", type=cli.comma(str), metavar="T-S,T-S", help=pairs)
        add(
            "--seeds",
            type=cli.number(int, 1, 1000),
            default=1,
            metavar="N",
            help="train each row with the random seeds 1 to N (default 1)",
        )
        epochs = "number of epochs (default: that of the protocol)"
        add("--epochs", type=cli.number(int, 1), metavar="N", help=epochs)
        add(
            "--data",
            type=cli.filled,
            metavar="NAME",
            help=f"dataset (default: that of the table): {cli.DATA_NAMES}",
        )
        add("--img_root", **folder, help="folder of the images (default ./datasets)")
        add(
            "--img_size",
            type=cli.number(int, *dataset.SIZES),
            metavar="N",
            help="resize images to NxN pixels",
        )
        add("--teacher", **page, help="checkpoint of the teacher (default: train it first)")
        add(
            "--jobs",
            type=cli.number(int, 1, 256),
            default=1,
            metavar="J",
            help="trainings at the same time (default 1)",
        )
        ways = parser.add_mutually_exclusive_group()
        ways.add_argument(
            "--together",
            action="store_true",
            help="train the methods of a pair and seed in one process, which runs the teacher once "
            "(default)",
        )
        ways.add_argument("--apart", action="store_true", help="one process per training")
        add("--dry_run", action="store_true", help="print the commands and recipes; run nothing")
        tables_slurm.add_flags(parser, cli.filled, cli.number)
        cli.add_device_flags(parser)
    return parser.parse_args(argv[1:])


@console.command
def main(argv: list[str] | None = None) -> None:
    """`list`, `run`, `show` or `status`."""
    args = parse(sys.argv[1:] if argv is None else list(argv))
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()

"""The published tables, each a command: train what it needs, then show it beside the published figures.

    python tools/tables.py list
    python tools/tables.py run kdzoo-r20-r20 --data cifar10 --methods baseline,st,at --seeds 3
    python tools/tables.py show kdzoo-r20-r20

`run` trains the missing teacher, then every method and seed through train_base.py and train_kd.py. It
skips what is finished, goes on with what was interrupted and goes on after a failure; what another
process trains is waited for. `--dry_run` says the commands and their recipes instead. `show` gives last and best epoch, mean and deviation over the
seeds; the published figures are in published.csv. Runs of other data, epochs or precision are shown
apart, never in one mean.
"""

import csv
import ctypes
import hashlib
import io
import json
import os
import re
import reprlib
import shlex
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dataset  # noqa: E402
import train_base  # noqa: E402
import train_kd  # noqa: E402
import utils  # noqa: E402
from engine import cli, console, locks, published  # noqa: E402
from engine.checkpoint import find_weights, sha256, write_file  # noqa: E402
from kd_losses import METHODS  # noqa: E402
from utils import UserError  # noqa: E402
from engine.run import import_matplotlib  # noqa: E402

BASE = "baseline"
SIDES = ("teacher", "student")
NUM_CLASS = dict(cifar10=10, cifar100=100, digits=10, imagenet=1000)

# --- the tables ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """protocol: None where its recipe is not there. teacher: the epoch of the teacher that teaches, 'best'
    or 'last', as its authors have it, or 'library': its weights are those of its library. rows: what it
    consists of, (teacher, student, mode), where nothing is published; else they are those of
    published.csv. names: networks of published.csv that have another name here. budget: what published
    methods spend beyond the protocol. pretrained: whether teachers and students start from their
    library's weights."""

    title: str
    protocol: str | None
    teacher: str = "best"
    data: tuple[str, ...] = ("cifar100",)
    rows: tuple[tuple[str, str, str], ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    budget: dict[str, str] = field(default_factory=dict)
    pretrained: bool = False


CIFAR = ("cifar10", "cifar100")
LIBRARY = {
    theirs: f"torchvision/{name}"
    for theirs, name in (
        ("ResNet18", "resnet18"),
        ("ResNet34", "resnet34"),
        ("ResNet50", "resnet50"),
        ("ResNet152", "resnet152"),
        ("ResNeXt101_32x8d", "resnext101_32x8d"),
        ("MobileNetV2", "mobilenet_v2"),
    )
}
REUSED = "deploys projector and teacher's classifier"
BUDGET = {  # the first by the README that has its figures; its authors' files say 240 to 960 epochs
    "MLKD": "480 epochs, 2 views: 2 to 4 times",
    "MLKD+LS": "480 epochs (ShuffleNet 960), 2 views",
    "MLKD+LS, last epoch of one run": "480 epochs (ShuffleNet 960), 2 views",
    **{f"SimKD{factor}": REUSED for factor in ("", ", factor 2", ", factor 8")},
}
AGAIN = 2.0  # seconds after which to look again at what another process trains
SMALL = tuple(("resnet20", "resnet8", mode) for mode in (BASE, *METHODS))
TABLES = {
    "kdzoo-r20-r20": Table("KD-Zoo: resnet20 -> resnet20", "kdzoo", data=CIFAR),
    "kdzoo-r110-r20": Table("KD-Zoo: resnet110 -> resnet20", "kdzoo", data=CIFAR),
    "kdzoo-r110-r110": Table("KD-Zoo: resnet110 -> resnet110", "kdzoo", data=CIFAR),
    "kdzoo-dml": Table("KD-Zoo: deep mutual learning", "kdzoo", data=CIFAR),
    "crd": Table("the CRD benchmark (RepDistiller)", "crd", "last"),
    "mdistiller": Table("MDistiller on CIFAR-100: KD and DKD", "crd", "last"),
    "reviewkd": Table("ReviewKD on CIFAR-100", "reviewkd", "last"),
    "sota": Table("CIFAR-100: the newer methods", "crd", "last", budget=BUDGET),
    "knowledgereview": Table(
        "KnowledgeReview: CIFAR-100 at 224 pixels",
        "knowledgereview",
        names=LIBRARY,
        pretrained=True,
    ),
    "imagenet-r34-r18": Table(
        "ImageNet: ResNet34 -> ResNet18",
        "mdistiller-imagenet",
        "library",
        data=("imagenet",),
        names=LIBRARY,
    ),
    "imagenet-r50-mv1": Table(
        "ImageNet: ResNet50 -> MobileNetV1",
        "mdistiller-imagenet",
        "library",
        data=("imagenet",),
        names=LIBRARY,
    ),
    "tiny-imagenet": Table("MDistiller on Tiny-ImageNet", None, data=("tiny-imagenet",)),
    "small": Table("resnet20 -> resnet8, nothing published", "kdzoo", data=(), rows=SMALL),
}


def figures_of(name: str) -> list[dict]:
    """The published figures of a table; one may be published by several sources."""
    own, spent = TABLES[name].names, TABLES[name].budget
    with open(Path(__file__).parent / "published.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == name]
    rows = [row | dict(budget=spent.get(row["method"], "")) for row in rows]
    return [row | {side: own.get(row[side], row[side]) for side in SIDES} for row in rows]


def short(net: str) -> str:
    """A network's name without its library."""
    return net.rsplit("/", 1)[-1]


def label(t: str, s: str) -> str:
    return f"{short(t)}-{short(s)}"


def rows_of(name: str, data: str, pairs: list[str] | None, modes: list[str] | None) -> list[tuple]:
    """(teacher, student, mode) of what the table consists of, or of what is asked for."""
    table = TABLES[name]
    home = data if data in table.data else next(iter(table.data), None)
    found = list(table.rows)
    for f in figures_of(name):
        if f["data"] == home and f["value"] != "N/A" and f["mode"] not in ("", "teacher"):
            found.append((f["teacher"], f["student"], f["mode"].split(":")[0]))
    there = {label(t, s): (t, s) for t, s, _ in found if t}
    for pair in pairs or []:
        utils.named(there, pair, f"pair of {name}")
    for mode in modes or []:
        utils.named({BASE: None, **METHODS}, mode, "method")
    wanted = [there[pair] for pair in pairs or there]
    if modes:
        return [(*pair, mode) for pair in wanted for mode in modes]
    students = {s for _, s in wanted}
    found = dict.fromkeys(found)
    return [(t, s, m) for t, s, m in found if ((t, s) in wanted if t else s in students)]


# --- what is to be run -----------------------------------------------------------------------------


@dataclass
class Job:
    """One training: its script and flags, the folder that it fills, the epochs it takes, the folder of
    the teacher that it waits for, and its recipe in a line."""

    script: str
    argv: list[str]
    folder: Path
    epochs: int
    needs: Path | None
    recipe: str

    def __str__(self) -> str:
        return shlex.join(["python", self.script, *self.argv])

    @property
    def finished(self) -> bool:
        """Whether its result is there and can be read; one that was damaged is written again."""
        try:
            return bool(read_json(self.folder / "result.json"))
        except ValueError:
            return False


def setting(args, table: Table) -> str:
    """The folder for runs under the same settings. An image folder goes by its name and by what is in
    it, wherever it lies."""
    data = args.data
    if data == "imagefolder":
        root = Path(args.img_root)
        name = re.sub(r"[^\w.-]", "_", root.resolve().name)[:60]
        data = f"{name}-{fingerprint(dataset.folder_identity(root))}"
    epochs = args.epochs or published.PROTOCOLS[table.protocol].epochs
    parts = [data] + ([f"{args.img_size}px"] if args.img_size else [])
    parts += [f"{epochs}ep"] + ([args.amp] if args.amp != "auto" else [])
    if args.teacher:
        parts.append(f"teacher{sha256(args.teacher)[:8]}")
    return "-".join(parts)


def same_images(home: Path, root: str | None) -> None:
    """Raise UserError where the runs of a setting are of another imagenet than that in `root`."""
    root, now = Path(root or "./datasets"), None
    for path in sorted(home.glob("**/args.json")):
        try:
            before = read_json(path)["sources"]["data"]
        except (ValueError, KeyError, TypeError):
            continue
        now = now or dataset.folder_identity(root, dataset.VALIDATED)
        if before != now:
            raise UserError(
                f"{home} holds runs of other images than those in {root}: give another --runs"
            )
        return


def fingerprint(identity: dict) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def jobs_of(args, table: Table, rows: list[tuple]) -> list[Job]:
    """The trainings of the rows, teachers first, then seed by seed."""
    home = Path(args.runs) / table.protocol / setting(args, table)
    common = ["--data_name", args.data, "--protocol", table.protocol]
    for flag in ("img_root", "img_size", "epochs", "cuda", "workers"):
        if getattr(args, flag) is not None:
            common += [f"--{flag}", str(getattr(args, flag))]
    common += ["--amp", args.amp] if args.amp != "auto" else []
    jobs = {}

    def base(net: str, seed: int) -> Path:
        folder = home / f"base-{short(net)}-{seed}"
        argv = ["--net_name", net, *["--pretrained"] * table.pretrained, *common]
        argv += place(folder, seed)
        recipe = train_base.resolve(train_base.parse(argv))
        jobs.setdefault(
            folder, Job("train_base.py", argv, folder, recipe.epochs, None, plain(recipe))
        )
        return folder

    def distil(t: str, s: str, mode: str, seed: int) -> None:
        folder = home / label(t, s) / f"{mode}-{seed}"
        argv = ["--kd_mode", mode, "--t_name", t, "--s_name", s]
        argv += ["--s_pretrained"] * table.pretrained
        needs, teacher = None, args.teacher
        if not teacher and table.teacher == "library":
            argv.append("--t_pretrained")
        elif METHODS[mode].teacher != "trained":
            if not teacher:
                needs = base(t, 1)
                teacher = needs / dict(best="model_best", last="checkpoint")[table.teacher]
                teacher = f"{teacher}.pth.tar"
            argv += ["--t_model", teacher]
        argv += [*common, *place(folder, seed)]
        flags, rows = train_kd.parse(argv, t, s)
        row = rows[mode]
        recipe = train_kd.resolve(flags, rows, s, {})
        phases = train_kd.planned(row.phases, recipe)
        jobs[folder] = Job(
            "train_kd.py",
            argv,
            folder,
            sum(epochs for _, epochs in phases),
            needs,
            f"{plain(recipe)}; {compared(row, phases, args.data)}",
        )

    distilled = [row for row in rows if row[2] != BASE]
    if not args.teacher and table.teacher != "library":
        for t in dict.fromkeys(t for t, _, mode in distilled if METHODS[mode].teacher != "trained"):
            base(t, 1)
    for seed in range(1, args.seeds + 1):
        for t, s, mode in rows:
            base(s, seed) if mode == BASE else distil(t, s, mode, seed)
    return list(jobs.values())


def place(folder: Path, seed: int) -> list[str]:
    return ["--seed", str(seed), "--save_root", str(folder.parent), "--note", folder.name]


def plain(recipe) -> str:
    small = recipe.img_size is None or recipe.img_size < 100
    return f"{recipe.epochs} epochs, {cli.describe_recipe(recipe, small)}"


def compared(row, phases: list[tuple], data: str) -> str:
    """A method's weights and flags, in a line."""
    weight = row.lambda_kd
    if callable(weight):
        weight = weight(NUM_CLASS[data]) if data in NUM_CLASS else "by the number of classes"
    what = dict(lambda_kd=weight, lambda_ce=row.lambda_ce, **row.flags)
    if {"stages", "preacts"} & set(row.compare.wants):
        what |= dict(stages=row.stages or "all", reduce=row.reduce)
    if len(phases) > 1:
        what["phases"] = " + ".join(f"{phase.name} {epochs}" for phase, epochs in phases)
    return ", ".join(f"{key} {value}" for key, value in what.items())


# --- running ---------------------------------------------------------------------------------------


def run(args) -> None:
    table = TABLES[args.table]
    if table.protocol is None:
        raise UserError(f"{args.table} cannot be run, its recipe is not there; `show` shows it")
    args.data = args.data or (table.data[0] if table.data else None)
    if args.data is None:
        raise UserError(f"--data is needed: {cli.DATA_NAMES}")
    if args.data == "imagefolder" and not args.img_root:
        raise UserError("--data imagefolder needs --img_root DIR")
    check_places(args)
    rows = rows_of(args.table, args.data, args.pairs, args.methods)
    if args.teacher:
        knows = find_weights(None, args.teacher, "t_name", "teacher").name
        others = {t for t, _, mode in rows if mode != BASE} - {knows}
        if others:
            raise UserError(
                f"--teacher {args.teacher} is a {knows}, the table wants {', '.join(others)}: "
                "choose with --pairs"
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
    if args.out:  # or say before all is trained that nothing can be written there
        make_folder(Path(args.out))
        remembered(Path(args.out) / f"{args.table}.runs.csv")
    failed = work(todo, jobs, args.jobs, args.cuda)
    show(args)
    if failed:
        raise UserError(f"{len(failed)} of {len(todo)} trainings failed, see above")


def check(job: Job) -> None:
    """A wrong flag or missing data is said before anything starts."""
    if job.folder.exists():
        return
    script = train_base if job.script == "train_base.py" else train_kd
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        # a first job has no teacher to wait for, or one that is there
        script.main([*job.argv, "--dry_run"])


def work(todo: list[Job], jobs: list[Job], side_by_side: int, cuda) -> list[Job]:
    """Run the jobs, some side by side. Returns those that failed."""
    gpus = torch.cuda.device_count() if cuda != 0 else 0
    waiting, running, failed = list(todo), [], []
    slots = list(range(side_by_side))
    again = {}  # when to look again at those that another process trains

    def tell(words: list[str]) -> None:
        left = [*waiting, *(job for job, *_ in running)]
        done = len([job for job in jobs if job.finished])
        ahead = time_left(jobs, left, side_by_side)
        print(f"{done} of {len(jobs)}  {' '.join(words)}{ahead}", flush=True)

    try:
        while waiting or running:
            busy = {job.folder for job in (*waiting, *(job for job, *_ in running))}
            ready = [job for job in waiting if job.needs not in busy]
            ready = [job for job in ready if time.monotonic() >= again.get(job.folder, 0)]
            if ready and slots:
                job = ready[0]
                try:
                    if job.needs in [other.folder for other in failed]:
                        raise UserError("not run, its teacher failed")
                    begun = start(job, slots[0], side_by_side, gpus)
                except UserError as error:
                    waiting.remove(job)
                    failed.append(job)
                    print(f"{job.folder}: {error}", flush=True)
                    continue
                except locks.Held as other:
                    if job.folder not in again:
                        print(f"{job.folder}: waits for {other}, which trains there", flush=True)
                    again[job.folder] = time.monotonic() + AGAIN
                    continue
                waiting.remove(job)
                if begun:
                    running.append((job, *begun, slots.pop(0)))
                else:
                    tell([f"{job.folder}: finished by another process"])
                continue
            time.sleep(0.1)
            for entry in [e for e in running if e[1].poll() is not None]:
                running.remove(entry)
                job, process, file, slot = entry
                slots.append(slot)
                says = last_line(output(job))
                if process.returncode or not job.finished:
                    failed.append(job)
                    print(f"{job.folder}: failed: {' '.join(says)}\n  {job}", flush=True)
                else:
                    output(job).unlink(missing_ok=True)
                    tell(says)
                file.close()
    finally:
        for _, process, *_ in running:
            process.terminate()
        for _, process, file, _ in running:
            process.wait()
            file.close()
    return failed


def start(job: Job, slot: int, side_by_side: int, gpus: int):
    """Begin a training, or go on with one that was interrupted: its process and the file that it
    prints into; None where another process has just finished it. Nothing is removed.

    The file is locked as long as the training lives, also where this process is killed, so of several
    `run`s on one table only one works on a training. Raises locks.Held where another does.
    """
    try:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        file = claim(job)
    except OSError as error:
        raise UserError(f"cannot be begun ({error.strerror})") from error
    try:
        if job.finished:
            output(job).unlink(missing_ok=True)
            file.close()
            return None
        return launch(job, file, slot, side_by_side, gpus), file
    except BaseException:
        file.close()
        raise


def claim(job: Job):
    """The file that a training prints into, for this process alone. Raises locks.Held."""
    try:
        file = locks.hold(output(job))
    except locks.Held:
        raise locks.Held(locks.held(job.folder / ".lock") or "another process") from None
    except OSError as error:
        if error.errno not in locks.NO_LOCKS:
            raise
        print(f"warning: no locks in {job.folder.parent}: start one run at a time", flush=True)
        return open(output(job), "a", encoding="utf-8")
    other = locks.held(job.folder / ".lock")  # one that no table has begun
    if other:
        file.close()
        raise locks.Held(other)
    return file


def launch(job: Job, file, slot: int, side_by_side: int, gpus: int) -> subprocess.Popen:
    more = []
    if job.folder.exists():  # whatever state it is in, --resume goes on or says what is wrong
        more = ["--resume"]
        try:
            args = read_json(job.folder / "args.json")
        except ValueError:
            args = {}
        made = args.get("command")
        if isinstance(made, str) and without_place(made, args.get("recipe")) != without_place(
            " ".join([job.script, *job.argv]), dict(zip(job.argv, job.argv[1:]))
        ):
            raise UserError(f"made by another command: {made}; remove it or give another --runs")
    file.truncate(0)
    env = dict(os.environ)
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
    elif side_by_side > 1:  # threads of several processes stall each other
        env["OMP_NUM_THREADS"] = str(max(1, utils.cpus() // side_by_side))
    try:
        return subprocess.Popen(
            [sys.executable, str(ROOT / job.script), *job.argv, *more],
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    except OSError as error:
        raise UserError(f"cannot be begun ({error.strerror})") from error


def without_place(command: str, flags) -> str:
    """A command without --resume and the flags that may change meanwhile: where the images lie (that
    they are the same is looked at) and on what it is computed. flags: their values, by --name or name.
    """
    flags = flags if isinstance(flags, dict) else {}
    for name in ("img_root", "cuda", "workers"):
        value = flags.get(f"--{name}", flags.get(name))
        command = command.replace(f" --{name} {value}", "", 1)
    return command.removesuffix(" --resume")


def last_line(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    except OSError:
        return []


def _die_with_parent() -> None:
    """No training outlives a `run` that was killed: the next one would find its folder in use."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def output(job: Job) -> Path:
    """What a training prints, kept where it fails."""
    return job.folder.with_name(job.folder.name + ".out")


def time_left(jobs: list[Job], left: list[Job], side_by_side: int) -> str:
    """How long the rest may take, from the seconds an epoch of the same method or of any took."""
    rates = {}
    for job in jobs:
        try:
            seconds = checked("seconds", read_json(job.folder / "result.json").get("seconds"))
        except ValueError:
            continue
        rates.setdefault(job.folder.name.rsplit("-", 1)[0], []).append(seconds / job.epochs)
    if not left or not rates:
        return ""
    usual = mean(mean(rate) for rate in rates.values())
    seconds = sum(
        job.epochs * mean(rates.get(job.folder.name.rsplit("-", 1)[0], [usual])) for job in left
    )
    return f"  about {seconds / side_by_side / 60:.0f} min left"


# --- showing ---------------------------------------------------------------------------------------

RECORD = "protocol setting data teacher student mode seed epochs last best seconds added precision"
COLUMNS = (
    "setting data epochs teacher student mode method metric seeds last_mean last_std best_mean best_std "
    "published reported budget difference added seconds precision source also note"
)
FEW = 16_000_000  # bytes: no file of a run or table is larger
CHECKS = {
    "a name": lambda x: isinstance(x, str) and 0 < len(x) <= 200 and x.isprintable(),
    "a name or nothing": lambda x: x == "" or CHECKS["a name"](x),
    "a whole number of at least 0": lambda x: type(x) is int and 0 <= x <= 2**53,
    "a whole number of at least 1": lambda x: type(x) is int and 1 <= x <= 2**53,
    "a number from 0 to 100": lambda x: type(x) in (int, float) and 0 <= x <= 100,
    "a number of at least 0": lambda x: type(x) in (int, float) and 0 <= x <= 1e15,
}
NAME, NAME_OR_NOTHING, COUNT, AT_LEAST_1, PERCENT, NUMBER = CHECKS
FIELDS = dict.fromkeys(RECORD.split(), NAME) | dict(
    teacher=NAME_OR_NOTHING,
    seed=COUNT,
    epochs=AT_LEAST_1,
    last=PERCENT,
    best=PERCENT,
    seconds=NUMBER,
    added=COUNT,
)


def checked(key: str, value):
    """`value`, or a ValueError that says what a record's `key` has to be."""
    if not CHECKS[FIELDS[key]](value):
        raise ValueError(f"its {key} is {reprlib.repr(value)}, {FIELDS[key]} is wanted")
    return value


def read_json(path: Path) -> dict:
    """The object in a file. Raises ValueError, one line, where there is none."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path.name} is damaged (nested too deep)") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged or cut short ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no object but {reprlib.repr(value)}")
    return value


def read_text(path: Path) -> str:
    """The text of a small file, with or without a byte order mark. Raises ValueError, one line."""
    try:
        if not path.is_file():  # one that never ends, perhaps
            raise ValueError(f"{path.name} is missing, or no file")
        if path.stat().st_size > FEW:
            raise ValueError(f"{path.name} is too large ({path.stat().st_size:,} bytes)")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is no UTF-8") from None


def shown(path: Path) -> str:
    """A path in a line: escaped where it cannot be printed, and not endless."""
    text = str(path)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def collect(runs: Path, protocol: str) -> list[dict]:
    """A record of every finished run of a protocol; mutual learning gives one for each network. What
    cannot be read is named, in a line, and left out."""
    records, homes = [], {}

    def left_out(folder, reason) -> None:
        print(f"warning: {shown(folder)} is left out: {reason}", file=sys.stderr, flush=True)

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            left_out(error.filename, error.strerror)

    for folder in finished_runs(runs / protocol, unreadable):
        try:
            found = records_of(folder, runs / protocol)
            same = homes.get(_key(found[0]))
            if same:
                raise ValueError(f"it is a copy of {shown(same)}")
        except ValueError as error:
            left_out(folder, error)
            continue
        homes[_key(found[0])] = folder
        records += found
    return records


def finished_runs(home: Path, unreadable) -> list[Path]:
    """The folders with a result below those of the settings, which may be links."""
    found = []
    try:
        settings = sorted(entry.path for entry in os.scandir(home) if entry.is_dir())
    except OSError as error:
        unreadable(error)
        return []
    for where in settings:
        for folder, _, names in os.walk(where, onerror=unreadable):
            found += [Path(folder)] if "result.json" in names else []
    return sorted(found)


def records_of(folder: Path, home: Path) -> list[dict]:
    """The records of the run in a folder. Raises ValueError, one line, where it is damaged or a copy."""
    result, args = read_json(folder / "result.json"), read_json(folder / "args.json")

    def said(*keys: str):
        value = args
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"args.json does not say its {' '.join(keys)}")
            value = value[key]
        return value

    recipe, place = said("recipe"), folder.relative_to(home)
    mode, _, seed = folder.name.rpartition("-")
    base = mode.startswith("base-")
    if not re.fullmatch("[0-9]{1,10}", seed) or not (base or mode in METHODS):
        raise ValueError("its name is not METHOD-SEED or base-NETWORK-SEED")
    common = dict(
        protocol=home.name,
        setting=place.parts[0],
        data=said("recipe", "data_name"),
        teacher="",
        student=said("meta", "network"),
        mode=BASE,
        seed=int(seed),
        epochs=said("recipe", "epochs"),
        last=result.get("last"),
        best=result.get("best"),
        seconds=result.get("seconds"),
        added=args.get("added", 0),
        precision="bf16" if "bfloat16" in str(said("machine")) else "fp32",
    )
    if not base:
        # the trained network may be the student with parts of the teacher
        student = recipe.get("s_name") or common["student"]
        common |= dict(mode=mode, teacher=said("teacher", "network"), student=student)
    for key in RECORD.split():
        checked(key, common[key])
    if not base:
        checked("student", common["teacher"])
    # what the run itself says of its place: a copied folder says another
    says = dict(kd_mode=None if base else mode, protocol=home.name, seed=int(seed))
    for key, value in dict(says, note=folder.name).items():
        if value is not None and recipe.get(key, value) != value:
            raise ValueError(f"args.json says its {key} is {reprlib.repr(recipe[key])}: a copy?")
    root = recipe.get("save_root")
    inner = place.parent.parts
    if not inner:
        raise ValueError("it is in no folder of a setting")
    if isinstance(root, str) and Path(root).parts[-len(inner) :] != inner:
        raise ValueError(f"args.json says its save_root is {reprlib.repr(root)}: a copy?")
    common["seconds"] = round(common["seconds"])
    records = [common]
    if {"peer_last", "peer_best"} & set(result):
        peer = {key: checked(key, result.get(f"peer_{key}")) for key in ("last", "best")}
        records.append(common | peer | dict(mode=f"{mode}:net1"))
    return records


def remembered(path: Path) -> tuple[list[str], list[dict]]:
    """The columns and records of a .runs.csv, also of one that a spreadsheet saved (a byte order mark,
    semicolons or tabs, decimal commas, columns of its own). Raises UserError, which names the line,
    where it holds anything else: what it remembers may be nowhere else."""
    if not (path.exists() or path.is_symlink()):
        return RECORD.split(), []
    line = None
    try:
        text = read_text(path)
        head = text.split("\n", 1)[0]
        cut = max(",;\t", key=head.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=cut, strict=True)
        columns, records = next(reader, []), []
        while columns and not columns[-1].strip():
            columns.pop()
        lacks = [key for key in RECORD.split() if key not in columns]
        if lacks:
            raise ValueError(f"there is no column {', '.join(lacks)}")
        if len(set(columns)) < len(columns):
            raise ValueError("two columns have one name")
        for row in reader:
            line = reader.line_num
            if not any(cell.strip() for cell in row):
                continue
            if any(cell.strip() for cell in row[len(columns) :]):
                raise ValueError(f"{len(row)} cells, {len(columns)} columns")
            row = dict(zip(columns, row + [""] * len(columns)))
            records.append(row | {key: parsed(key, row[key], cut) for key in RECORD.split()})
    except (ValueError, csv.Error) as error:
        where = f"{shown(path)}{f', line {line}' if line else ''}"
        raise UserError(f"{where}: {error}: mend or remove it, it is left as it is") from error
    return columns, records


def parsed(key: str, cell: str, cut: str):
    """A cell of a record as what it is. Raises ValueError."""
    kind, text = FIELDS[key], cell.strip()
    if kind in (NAME, NAME_OR_NOTHING):
        return checked(key, text)
    number = text.replace(",", ".") if cut == ";" else text
    if not re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,20})?(e[-+][0-9]{1,2})?", number):
        return checked(key, text)
    value = float(number)
    whole = number.isdigit() or kind in (COUNT, AT_LEAST_1) and value % 1 == 0
    return checked(key, int(value) if whole else value)


def merge(path: Path, records: list[dict]) -> list[dict]:
    """The records with those that the file remembers of runs that are not here, and back into it."""
    columns, before = remembered(path)
    known = {_key(record): record for record in before}
    for record in records:
        known[_key(record)] = known.get(_key(record), {}) | record
    records = [known[key] for key in sorted(known)]
    if records:
        write_csv(path, records, columns)
    return records


def _key(record: dict) -> tuple:
    return tuple(record[k] for k in ("setting", "teacher", "student", "mode", "seed"))


def write_csv(path: Path, rows: list[dict], columns: list[str] | None = None) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns or list(rows[0]), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    try:
        write_file(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error


def summarise(name: str, records: list[dict]) -> list[dict]:
    """The table's rows, a block for every setting and pair: ours beside what is published. What was
    not run under the published setting stands there alone."""
    table, figures = TABLES[name], figures_of(name)
    full = published.PROTOCOLS[table.protocol].epochs if table.protocol else None
    pairs = dict.fromkeys((t, s) for t, s, _ in table.rows)
    pairs |= dict.fromkeys((f["teacher"], f["student"]) for f in figures if f["teacher"])
    settings = {  # (where, data, epochs) -> whether it is a published one: no size of its own either
        (r["setting"], r["data"], r["epochs"]): r["data"] in table.data
        and r["setting"].startswith(f"{r['data']}-{full}ep")
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
    """The rows of one pair under one setting; none where nothing was distilled, if not `bare`."""
    lines = {}  # (mode or method, metric) -> our runs, published figures
    for side, items in enumerate((records, figures)):
        for item in items:
            for mode in roles(item, *pair):
                key = mode or item["method"], item.get("metric", "top1")
                lines.setdefault(key, ([], []))[side].append(item)
    if not bare and all(key[0].startswith(("teacher", BASE)) for key in lines):
        return []
    # the published order, then ours; above all the two networks as they are without distillation
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
        ours = row.get(f"{row['reported']}_mean")  # of an epoch that its source says
        if runs and same and same[0]["value"] != "N/A" and ours is not None:
            row["difference"] = round(ours - float(row["published"]), 2)
        rows.append(row)
    return rows


def roles(item: dict, t: str, s: str) -> list[str]:
    """The rows of a pair that a run or a figure belongs to, by their modes."""
    if item["mode"] == BASE:
        return [BASE] * (item["student"] == s) + ["teacher"] * (item["student"] == t != s)
    return [item["mode"]] * ((item["teacher"], item["student"]) == (t, s))


def beside(same: list[dict]) -> dict:
    """One row's published figures: the first source's, and the others' beside it."""
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


def markdown(name: str, rows: list[dict]) -> str:
    """The table, a part for every setting and pair."""
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
    """A block as a Markdown table, without the columns that it has nothing for."""
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
    """The rows of every block."""
    parts = {}
    for row in rows:
        place = row["setting"], row["data"], row["teacher"], row["student"]
        parts.setdefault(place, []).append(row)
    return parts


def _paragraphs(lines: list[str]) -> list[str]:
    """Lines of a table stay together."""
    blocks = []
    for line in lines:
        if line.startswith("|") and blocks and blocks[-1].startswith("|"):
            blocks[-1] += "\n" + line
        else:
            blocks.append(line)
    return blocks


def spread(row: dict, what: str) -> str:
    if not row["seeds"]:
        return ""
    deviation = row[f"{what}_std"]
    return f"{row[f'{what}_mean']:.2f}" + (f" ± {deviation:.2f}" if deviation != "" else "")


def draw(rows: list[dict], path: Path, title: str) -> bool:
    """Ours (last epoch, mean and deviation; best epoch hollow) and the published figures (crosses)."""
    if import_matplotlib() is None:
        print("no figure drawn: pip install matplotlib")
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
        what = (data if where == "published" else where).replace("$", r"\$")  # no formulas
        axis.set_title(f"{short(t)} -> {short(s)}, {what}", fontsize=9)
        axis.set_xlabel("test top-1 (%)", fontsize=8)
        axis.grid(alpha=0.3, axis="x")
    for axis in list(axes):
        axis.set_axis_off()
    crosses = ", published (crosses)" if any(row["published"] for row in rows) else ""
    figure.suptitle(f"{title}\nlast epoch (dots), best (circles){crosses}", fontsize=10)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:  # also of too many pixels
        raise UserError(f"{path} cannot be written ({utils.first_line(error)})") from error
    return True


def check_places(args) -> None:
    """Say what is wrong with --runs, --out and --into before anything is written or trained."""
    runs, out = Path(args.runs), Path(args.out) if args.out else None
    cli.usable_folder(runs, "--runs", write=args.command == "run")
    if out:
        cli.usable_folder(out, "--out")
        for kind in ("runs.csv", "csv", "md", "png"):
            if (out / f"{args.table}.{kind}").is_dir():
                raise UserError(f"--out {out}: {args.table}.{kind} is a folder")
    if args.into:
        split_page(Path(args.into), args.table)


def make_folder(path: Path) -> None:
    """The folder, made if need be, and written into for a try."""
    probe = path / f".{os.getpid()}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror})") from error


def show(args) -> None:
    check_places(args)
    table = TABLES[args.table]
    records = collect(Path(args.runs), table.protocol) if table.protocol else []
    out = Path(args.out) if args.out else None
    if out:
        make_folder(out)
        records = merge(out / f"{args.table}.runs.csv", records)
    rows = summarise(args.table, records)
    if not rows:
        raise UserError(f"nothing to show of {args.table}: no run in {args.runs}, none published")
    text = markdown(args.table, rows)
    if out:
        write_csv(out / f"{args.table}.csv", rows)
        write(out / f"{args.table}.md", text)
        draw(rows, out / f"{args.table}.png", table.title)
    if args.into:
        insert(Path(args.into), args.table, text)
    print(text)


def split_page(path: Path, name: str) -> tuple[str, str]:
    """What stands in a page up to the table's first mark, and from its last."""
    begin, end = f"<!-- tables.py show {name} -->", "<!-- end of the table -->"
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        before, rest = path.read_bytes().decode().split(begin)
        return before + begin, rest[rest.index(end) :]
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)} has no place for the table: {begin} ... {end}") from error


def insert(path: Path, name: str, text: str) -> None:
    """Put the table between its two marks in a page."""
    before, after = split_page(path, name)
    try:
        path.write_bytes(f"{before}\n{text}{after}".encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error


def overview(args) -> None:
    print("table             protocol  pairs  published  methods")
    for name, table in TABLES.items():
        figures = figures_of(name)
        rows = rows_of(name, next(iter(table.data), ""), None, None)
        pairs = len({row[:2] for row in rows if row[0]})
        modes = ",".join(dict.fromkeys(mode for *_, mode in rows)) or "-"
        print(f"{name:<17} {table.protocol or '-':<10}{pairs:>5}  {len(figures):>9}  {modes}")


# --- the command -----------------------------------------------------------------------------------

COMMANDS = dict(list=overview, run=run, show=show)


def parse(argv: list[str]):
    first = cli.Parser(prog="tables.py", description=__doc__)
    first.add_argument("command", choices=COMMANDS, help="COMMAND --help lists its flags")
    command = first.parse_args(argv[:1]).command
    parser = cli.Parser(prog=f"tables.py {command}")
    parser.set_defaults(command=command)
    add = parser.add_argument
    if command != "list":
        add("table", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
        folder = dict(type=cli.filled, metavar="DIR")
        add("--runs", default="runs/tables", **folder, help="(default runs/tables)")
        add("--out", **folder, help="also write CSV, Markdown and a figure there")
        page = dict(type=cli.filled, metavar="FILE")
        add("--into", **page, help="also put it between its marks in this page")
    if command == "run":
        add("--methods", type=cli.comma(str), metavar="M,M", help="(default: the table's)")
        add("--pairs", type=cli.comma(str), metavar="T-S,T-S", help="(default: the table's)")
        add(
            "--seeds",
            type=cli.number(int, 1, 1000),
            default=1,
            metavar="N",
            help="1 to N (default 1)",
        )
        add("--epochs", type=cli.number(int, 1), metavar="N", help="(default: the protocol's)")
        add(
            "--data",
            type=cli.filled,
            metavar="NAME",
            help="(default: the table's) " + cli.DATA_NAMES,
        )
        add("--img_root", **folder, help="where the images are (default ./datasets)")
        add("--img_size", type=cli.number(int, *dataset.SIZES), metavar="N", help="in pixels")
        add("--teacher", **page, help="a trained teacher (default: trained first)")
        add("--jobs", type=cli.number(int, 1, 256), default=1, metavar="J", help="side by side")
        add("--dry_run", action="store_true", help="say the commands and recipes, run nothing")
        cli.add_machine_flags(parser)
    return parser.parse_args(argv[1:])


@console.command
def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else list(argv))
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()

"""The tables and their trainings: commands, folders and recipes."""

import csv
import hashlib
import json
import os
import re
import shlex
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import train_base
import train_kd
import utils
from engine import cli, folders, kd_cli, published, shards
from engine.checkpoint import sha256
from engine.schedule import schedule
from engine.settings import Settings
from kd_losses import METHODS
from tools.tables_files import read_json
from utils import UserError

BASE = "baseline"
SIDES = ("teacher", "student")
NUM_CLASS = {"cifar10": 10, "cifar100": 100, "digits": 10, "imagenet": 1000, "tiny-imagenet": 200}


# --- the tables -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A published table.

    protocol: None if it has no recipe. teacher: which epoch of the teacher is used, 'best' or
    'last', as in the authors' code; 'library': the pretrained weights of torchvision or timm. rows:
    (teacher, student, mode) of each row, if nothing is published; otherwise the rows are those of
    published.csv. names: the names here of networks in published.csv, if they differ. budget: extra
    cost of published methods, above the protocol. pretrained: whether teachers and students start
    from the pretrained weights of their library.
    """

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
BUDGET = {  # MLKD: by the README with its figures; the authors' configs have 240 to 960 epochs
    "MLKD": "480 epochs, 2 views: 2 to 4 times",
    "MLKD+LS": "480 epochs (ShuffleNet 960), 2 views",
    "MLKD+LS, last epoch of one run": "480 epochs (ShuffleNet 960), 2 views",
    **{f"SimKD{factor}": REUSED for factor in ("", ", factor 2", ", factor 8")},
}
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
    "tiny-imagenet": Table(
        "MDistiller on Tiny-ImageNet",
        "mdistiller-tiny-imagenet",
        "last",
        data=("tiny-imagenet",),
    ),
    "small": Table("resnet20 -> resnet8, nothing published", "kdzoo", data=(), rows=SMALL),
}


def figures_of(name: str) -> list[dict]:
    """The published figures of a table. The same row may come from several sources."""
    own, spent = TABLES[name].names, TABLES[name].budget
    with open(Path(__file__).parent / "published.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == name]
    rows = [row | dict(budget=spent.get(row["method"], "")) for row in rows]
    return [row | {side: own.get(row[side], row[side]) for side in SIDES} for row in rows]


def short(net: str) -> str:
    """A network's name without its library."""
    return net.rsplit("/", 1)[-1]


def label(t: str, s: str) -> str:
    """The name of a pair of networks in --pairs and in folders."""
    return f"{short(t)}-{short(s)}"


def rows_of(name: str, data: str, pairs: list[str] | None, modes: list[str] | None) -> list[tuple]:
    """(teacher, student, mode) of the rows of a table, or of the chosen `pairs` and `modes`."""
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


# --- trainings ------------------------------------------------------------------------------------


@dataclass
class Job:
    """One training: script, flags, run directory, number of epochs, the folder of the teacher that
    it waits for (`needs`), and its recipe as one line.

    group: jobs of the same group can be students of one process; None: it needs a separate process.
    student: for a baseline, its flags of train_kd.py in such a process; separately it is trained by
    train_base.py.
    """

    script: str
    argv: list[str]
    folder: Path
    epochs: int
    needs: Path | None
    recipe: str
    group: tuple | None = None
    student: list[str] | None = None

    def __str__(self) -> str:
        return shlex.join(["python", self.script, *self.argv])

    @property
    def finished(self) -> bool:
        """Whether its result exists and can be read. A damaged result is written again."""
        try:
            return bool(read_json(self.folder / "result.json"))
        except ValueError:
            return False


def setting(args, table: Table) -> str:
    """The name of the folder of all runs with the same settings. An image folder is identified by
    its name and its contents, not by its path."""
    data = args.data
    if data == "imagefolder":
        root = Path(args.img_root)
        name = re.sub(r"[^\w.-]", "_", root.resolve().name)[:60]
        data = f"{name}-{fingerprint(folders.folder_identity(root))}"
    if data == shards.NAME:
        data = f"{data}-{fingerprint(shards.identity(args.img_root))}"
    epochs = args.epochs or published.PROTOCOLS[table.protocol].epochs
    parts = [data] + ([f"{args.img_size}px"] if args.img_size else [])
    parts += [f"{epochs}ep"] + ([args.amp] if args.amp != "auto" else [])
    if args.teacher:
        parts.append(f"teacher{sha256(args.teacher)[:8]}")
    return "-".join(parts)


def same_images(home: Path, root: str | None) -> None:
    """Raise UserError if the runs in `home` used other ImageNet images than those in `root`."""
    root, now = Path(root or "./datasets"), None
    for path in sorted(home.glob("**/args.json")):
        try:
            before = read_json(path)["sources"]["data"]
        except (ValueError, KeyError, TypeError):
            continue
        now = now or folders.folder_identity(root, folders.VALIDATED)
        if before != now:
            raise UserError(
                f"{home} has runs on other images than those in {root}; give another --runs DIR"
            )
        return


def fingerprint(identity: dict) -> str:
    """Eight hexadecimal digits that identify a folder of images."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def jobs_of(args, table: Table, rows: list[tuple]) -> list[Job]:
    """The trainings of the rows, teachers first, then seed by seed."""
    home = Path(args.runs) / table.protocol / setting(args, table)
    common = ["--data_name", args.data, "--protocol", table.protocol]
    for flag in ("img_root", "img_size", "epochs", "cuda", "workers"):
        if getattr(args, flag) is not None:
            common += [f"--{flag}", str(getattr(args, flag))]
    for flag in ("amp", "device"):
        if getattr(args, flag) != "auto":
            common += [f"--{flag}", getattr(args, flag)]
    jobs = {}

    def base(net: str, seed: int) -> Path:
        folder = home / f"base-{short(net)}-{seed}"
        argv = ["--net_name", net, *["--pretrained"] * table.pretrained, *common]
        argv += place(folder, seed)
        recipe = train_base.resolve(train_base.parse(argv))
        job = Job("train_base.py", argv, folder, recipe.epochs, None, plain(recipe))
        return jobs.setdefault(folder, job).folder

    def baseline(t: str, s: str, seed: int) -> None:
        """The student without a teacher; it can be trained together with distilled students."""
        job = jobs[base(s, seed)]
        smooth = published.PROTOCOLS[table.protocol].label_smoothing
        if job.group is None and t and not smooth:  # only train_base.py has label smoothing
            job.group = t, s, seed, train_base.resolve(train_base.parse(job.argv)).batch_size
            job.student = ["--kd_mode", kd_cli.NONE, "--s_name", s]
            job.student += ["--s_pretrained"] * table.pretrained
            job.student += [*common, *place(job.folder, seed)]

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
        flags = kd_cli.parse(argv, "")
        recipe = kd_cli.resolve(flags, s, {})
        settings = kd_cli.settings_of(flags, t, s, NUM_CLASS.get(args.data, 100))[mode]
        phases = schedule(settings.phases, recipe)
        alone = METHODS[mode].teacher == "trained"
        jobs[folder] = Job(
            "train_kd.py",
            argv,
            folder,
            sum(epochs for _, epochs in phases),
            needs,
            f"{plain(recipe)}; {compared(settings, phases, args.data in NUM_CLASS)}",
            None if alone else (t, s, seed, recipe.batch_size),
        )

    distilled = [row for row in rows if row[2] != BASE]
    if not args.teacher and table.teacher != "library":
        for t in dict.fromkeys(t for t, _, mode in distilled if METHODS[mode].teacher != "trained"):
            base(t, 1)
    for seed in range(1, args.seeds + 1):
        for t, s, mode in rows:
            baseline(t, s, seed) if mode == BASE else distil(t, s, mode, seed)
    return list(jobs.values())


def together(jobs: list[Job]) -> list[str]:
    """The flags of train_kd.py that train the jobs of one group in one process."""
    lines = {line[1]: line for line in (job.student or job.argv for job in jobs)}
    (first, seed) = next((x.argv, x.group[2]) for x in jobs if not x.student)
    argv = ["--kd_mode", ",".join(lines), *first[2:-1], str(seed)]
    for name, line in lines.items():
        if name == kd_cli.NONE:
            *_, root, _, note = line
            argv += [f"--{name}.save_root", root, f"--{name}.note", note]
    return argv


def place(folder: Path, seed: int) -> list[str]:
    """The flags for the seed and the folder of a training."""
    return ["--seed", str(seed), "--save_root", str(folder.parent), "--note", folder.name]


def plain(recipe) -> str:
    """The recipe of a training as one line, without the settings of its method."""
    small = recipe.img_size is None or recipe.img_size < 100
    return f"{recipe.epochs} epochs, {cli.describe_recipe(recipe, small)}"


def compared(settings: Settings, phases: list[tuple], classes_known: bool) -> str:
    """Weights and flags of a method as one line."""
    weight = settings.lambda_kd
    if not classes_known and settings.origin["lambda_kd"].endswith(" classes"):
        weight = "by the number of classes"
    what = dict(lambda_kd=weight, lambda_ce=settings.lambda_ce, **settings.flags)
    if settings.inputs.reads_stages:
        what |= dict(stages=settings.stages or "all", reduce=settings.reduce)
    if len(phases) > 1:
        what["phases"] = " + ".join(f"{phase.name} {epochs}" for phase, epochs in phases)
    return ", ".join(f"{key} {value}" for key, value in what.items())


def check(job: Job) -> None:
    """Raise UserError for a wrong flag or missing data, before a training starts."""
    if job.folder.exists():
        return
    script = train_base if job.script == "train_base.py" else train_kd
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        # the first job has no teacher, or its teacher is already trained
        script.main([*job.argv, "--dry_run"])

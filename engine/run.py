"""The run directory: log, metrics, checkpoints, resume, and the signals that ask for an end."""

import argparse
import csv
import json
import os
import platform
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from engine import loggers
from engine.locks import NO_LOCKS, Held, hold
from engine.console import Stopped, say
from engine.checkpoint import read_checkpoint, save_checkpoint, to_cpu, write_file
from engine.signals import Signals
from utils import (
    printable,
    Meter,
    UserError,
    all_gather,
    control_group,
    first_line,
    rank,
    rng_state,
    shown,
    world,
)

# flags that do not decide the result: --resume may change them
FREE = frozenset(
    "print_freq tensorboard wandb save_every resume dry_run save_root note img_root".split()
    + ["unlabeled"]  # a folder, whose images are compared
    + "workers cuda cuda_graph device num_class".split()  # num_class: the dataset's in any case
)

VALIDATION = "val_top1"  # the score that chooses the best epoch where there is a validation set


class Run:
    """The folder save_root/note of one run and everything in it.

    args.json, log.txt, metrics.csv (a row an epoch, a function of flags and seed alone),
    timing.csv, curves.png, result.json (of a finished run), checkpoint.pth.tar (enough to continue
    bit for bit) and model_best.pth.tar. Nothing is written before `start()`; a folder that holds
    another run, or that another process writes into, is refused.

        with run.start(...):        # signals are caught from here on
            meter, done = run.begin()
            if run.due(): run.pause(state, meter, step, where)    # inside an epoch
            run.epoch(row, speed, state())                        # at its end

    loss, score: the metrics that the curves show; the best epoch is the one of the highest score.
    label: what the lines on the terminal begin with, where several runs share it; signals: shared
    by runs that end together.
    """

    def __init__(
        self,
        cfg: argparse.Namespace,
        note: str,
        argv: list[str],
        loss: str = "ce",
        score: str = "test_top1",
        label: str = "",
        signals: Signals | None = None,
    ):
        self.dir = Path(cfg.save_root) / note
        self.label, self.signals = label, signals or Signals()
        self.cfg, self.argv, self.loss, self.score = cfg, argv, loss, score
        self.history, self.timing = [], []
        self.best = dict(epoch=0, score=-1.0)
        self.saved = self.inside = self.known = None
        self.sources = {}
        self.where, self.warned = "before its first step", set()
        loggers.check(cfg)
        self.loggers = loggers.loggers_of(cfg, self.dir)
        self.checkpoint = self.dir / "checkpoint.pth.tar"
        for parent in [self.dir, *self.dir.parents]:
            try:
                file = parent.exists() and not parent.is_dir()
            except OSError as error:
                raise UserError(f"{parent} cannot be used ({error.strerror})") from error
            if file:
                raise UserError(f"{parent} is a file; give another --save_root or --note")
        if cfg.resume:
            if self.checkpoint.exists():
                self.saved = read_checkpoint(self.checkpoint)
                with self.intact():
                    self._same_flags(self.saved["flags"])
                    self.history, self.timing = self.saved["history"], self.saved["timing"]
                    self.best, self.inside = self.saved["best"], self.saved["inside"]
                    self._look_over()
                self.known = self.saved.get("sources") or self._recorded("sources")
            elif not self._bare():  # stopped before its first checkpoint
                recorded = self._recorded("recipe")
                if not isinstance(recorded, dict):
                    raise UserError(f"--resume: no run found in {self.dir} (checkpoint.pth.tar)")
                self._same_flags({key: recorded.get(key) for key in self._flags()})
                self.known = self._recorded("sources")
        elif self.dir.exists() and not self._bare():
            raise UserError(
                f"{self.dir} holds another run; continue it with --resume, or give --note NAME"
            )
        self.found = self._stamp()

    def _bare(self) -> bool:
        """Whether the folder is there and holds no more than what a run writes before its
        args.json: one that was killed that early."""
        early = {".lock", "args.json.tmp", "log.txt"}
        try:
            return all(
                x.name in early and x.is_file() and (x.name != "log.txt" or not x.stat().st_size)
                for x in self.dir.iterdir()
            )
        except FileNotFoundError:
            return False
        except OSError as error:
            raise UserError(f"{self.dir} cannot be read ({error.strerror})") from error

    def _stamp(self) -> list:
        """What changes when another process writes a run into the folder."""
        stamp = []
        for name in ("args.json", "checkpoint.pth.tar"):
            with suppress(OSError):
                found = (self.dir / name).stat()
                stamp.append((name, found.st_mtime_ns, found.st_size))
        return stamp

    def _before(self, what: str, default=None):
        """What the run said of its data or teacher when it was started."""
        return self.known.get(what, default) if isinstance(self.known, dict) else default

    def learns_from(
        self, data: dict, teacher: str | list | None = None, selection: str = "test"
    ) -> None:
        """Say what identifies the data and the teacher's file (its sha256; of several teachers a
        list); a resumed run must have those that it was started with. selection: the split that
        chooses the best epoch."""
        self.sources = dict(data=data, teacher=teacher)
        if selection == "val":
            self.score = VALIDATION
        own = self._before("teacher", teacher)
        if own != teacher:
            file = self.cfg.t_model
            if isinstance(teacher, list) and isinstance(own, list) and len(own) == len(teacher):
                k = next(k for k, (a, b) in enumerate(zip(own, teacher)) if a != b)
                file, own, teacher = f"{file} (number {k + 1})", own[k], teacher[k]
            raise UserError(
                f"--resume: --t_model {file} is not the file of the run's start "
                f"(sha256 {str(teacher)[:12]}, it was {str(own)[:12]}): put that one "
                "back, or start another run with --note NAME"
            )
        before = self._before("data")
        for split, now in data.items() if isinstance(before, dict) else ():
            if before.get(split) != now:
                raise UserError(
                    f"--resume: the {split} images in {self.cfg.img_root} are not those of the "
                    f"run's start ({_counted(before.get(split), now)}): give these with "
                    "--img_root, or start another run with --note NAME"
                )

    @contextmanager
    def intact(self):
        """Whatever fails in here, because the checkpoint holds something else, is a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--resume: {self.checkpoint} is damaged, or not a run's checkpoint "
                f"({type(error).__name__}: {first_line(error)}): start the run again"
            ) from error

    def _look_over(self) -> None:
        """Raise something where what the checkpoint says of its epochs cannot be."""
        [_line(row) for row in self.history]
        done = len(self.history)
        if done != len(self.timing):
            raise ValueError(f"{done} epochs and the times of {len(self.timing)}")
        if self.saved["epoch"] != done:
            raise ValueError(f"epoch {self.saved['epoch']!r} and {done} rows of metrics")
        for i, row in enumerate(self.timing, 1):
            if row["row"] != i or not _finite(row["seconds"]) or row["seconds"] < 0:
                raise ValueError(f"the time of epoch {i} is {row['seconds']!r} s")
        epoch, score = self.best["epoch"], self.best["score"]
        validated = any(VALIDATION in row for row in self.history)
        key = VALIDATION if validated else self.score
        scores = [row.get(key) for row in self.history]
        if epoch == 0:
            fine = score == -1.0
        else:
            fine = type(epoch) is int and 0 < epoch <= done and _short(score) == scores[epoch - 1]
        if not fine:
            raise ValueError(f"the best epoch is {epoch!r}, its score {score!r}")
        if self.saved.get("sources"):
            dict(self.saved["sources"]["data"], teacher=self.saved["sources"]["teacher"])
        if self.inside is not None:
            names = {"step", "meter", "seconds"}
            if not isinstance(self.inside, dict) or set(self.inside) != names:
                raise ValueError(f"the unfinished epoch needs {', '.join(sorted(names))}")
            self._look_over_meter(**self.inside)
        # what lies between the networks may wait for its first batch: see load_state
        numbers = {key: value for key, value in self.saved.items() if key not in ("rng", "kd")}
        bad = sorted({key for key, x in _tensors(numbers) if not x.isfinite().all()})
        if bad:
            raise ValueError(f"{', '.join(bad)} has entries that are not finite")

    def _look_over_meter(self, step, meter, seconds) -> None:
        if type(step) is not int or step < 1:
            raise ValueError(f"step {step!r} of the unfinished epoch")
        if not _finite(seconds) or seconds < 0:
            raise ValueError(f"{seconds!r} s of the unfinished epoch")
        for names, sums, count in meter:
            if type(count) is not int or count < 1 or sums.shape != (len(names),):
                raise ValueError(f"sums of {len(names)} metrics over {count!r} images")
        if not meter:
            raise ValueError("no sums of the unfinished epoch")
        Meter().load(meter)

    def fits(self, rows: list[dict], steps: int) -> None:
        """Raise ValueError if the epochs of the checkpoint are not the first of `rows`, which
        say something of each, or the current epoch has more than `steps` or none is left."""
        for i, row in enumerate(self.history):
            if i >= len(rows) or any(row.get(key) != value for key, value in rows[i].items()):
                raise ValueError(f"row {i + 1} of its metrics is not from this run")
        if self.inside and (self.inside["step"] > steps or len(self.history) == len(rows)):
            raise ValueError(f"step {self.inside['step']} of an epoch of {steps}")

    def _recorded(self, what: str):
        """What args.json remembers; None if it remembers nothing."""
        try:
            args = self._args()
            found = args.get(what)
            if what == "sources" and found is None and "teacher" in args:  # of older runs
                found = dict(teacher=args["teacher"]["sha256"])
            return found
        except (KeyError, TypeError, AttributeError):
            return None

    def _args(self) -> dict:
        """What args.json holds; nothing where it cannot be read."""
        try:
            args = json.loads((self.dir / "args.json").read_text(encoding="utf-8"))
            return args if isinstance(args, dict) else {}
        except (OSError, ValueError, RecursionError):
            return {}

    def _flags(self) -> dict:
        """The flags that decide the result, as plain values."""
        flags = {key: value for key, value in vars(self.cfg).items() if key not in FREE}
        return json.loads(json.dumps(flags, default=str))

    def _same_flags(self, saved: dict) -> None:
        now = self._flags()
        scripts = dict(
            net_name="train_base.py", iters="detection/train_det.py", kd_mode="train_kd.py"
        )
        other, own = (
            next((x for key, x in scripts.items() if key in f), None) for f in (saved, now)
        )
        if other != own:
            raise UserError(f"--resume: the run in {self.dir} belongs to {other}")
        for key in sorted((set(now) | set(saved)) - FREE):
            if now.get(key) != saved.get(key):
                raise UserError(
                    f"--resume: --{key} is {shown(now.get(key), 200)}, but the run has "
                    f"{shown(saved.get(key), 200)}"
                )

    def start(
        self,
        where: str,
        meta: dict,
        notes: dict | None = None,
    ) -> "Run":
        """Make the folder and write args.json. `where`: device and precision, in words; `meta`:
        what checkpoints remember of network and data; `notes`: what else belongs into args.json."""
        self.meta = meta
        all_gather(None)  # all have seen the folder as it was
        self.began = self.kept = time.perf_counter()
        if self.inside:
            self.began -= self.inside["seconds"]
        if rank() > 0:
            return self
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            open_to_all = self._lock()
            self.log_file = open(self.dir / "log.txt", "a", buffering=1, encoding="utf-8")
            record = self._args() if self.saved else self._write_args(where, notes or {})
            lines = [x.begin(record, self.history, self.timing) for x in self.loggers]
        except OSError as error:
            raise UserError(f"{self.dir} cannot be written ({error.strerror})") from error
        if open_to_all:
            self.warn(f"{open_to_all}: see that no other process trains in {self.dir}")
        if self.found and not isinstance(self._before("data"), dict):
            self.warn("the run does not record its images; they are not compared")
        for line in filter(None, lines):
            self.log(line)
        return self

    def _lock(self) -> str | None:
        """Hold the folder until this process ends, however it ends. Returns why it cannot be
        held."""
        self.lock = why = None
        try:
            self.lock = hold(self.dir / ".lock", patience=1.0)
        except Held as held:
            raise UserError(
                f"{self.dir} is in use by another process ({held or 'unknown'})"
            ) from held
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            why = f"the file system has no locks ({error.strerror})"
        if self._stamp() != self.found:
            raise UserError(f"{self.dir} is being written by another process; try again")
        if self.lock:
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()} on {platform.node()}\n")
            self.lock.flush()
        return why

    def _write_args(self, where: str, notes: dict) -> dict:
        record = dict(
            command=" ".join(self.argv),
            recipe={k: v for k, v in vars(self.cfg).items() if k not in ("resume", "dry_run")},
            machine=where,
            versions=dict(
                python=platform.python_version(),
                torch=torch.__version__,
                numpy=np.__version__,
            ),
            commit=_commit(),
            meta=self.meta,
            sources=self.sources,
            **notes,
        )
        text = json.dumps(record, indent=1, default=str) + "\n"
        write_file(self.dir / "args.json", text.encode())
        return record

    def __enter__(self) -> "Run":
        """Catch the signals that ask for an end."""
        self.signals.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.signals.__exit__(*error)
        if rank() > 0:
            return
        self.log_file.close()
        if self.lock:
            self.lock.close()
        for logger in self.loggers:
            logger.close()

    def log(self, text: str) -> None:
        """Print a line and keep it in log.txt."""
        if rank() > 0:
            return
        say(self.label + text)
        try:
            self.log_file.write(printable(text) + "\n")
        except OSError as error:
            raise self._full(error) from error

    def warn(self, text: str) -> None:
        """A warning, once."""
        if text not in self.warned:
            self.warned.add(text)
            self.log(f"warning: {text}")

    def watch(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Under --on_nan skip, the optimizer leaves out the steps whose gradients are no
        numbers."""

        def leave_out(optimizer, *args):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norms = torch._foreach_norm([grad for grad in grads if grad is not None])
            if not torch.stack([norm.float() for norm in norms]).isfinite().all():
                optimizer.zero_grad(set_to_none=True)
                self.log("a step with infinite or NaN gradients is skipped")

        if self.cfg.on_nan == "skip":
            optimizer.register_step_pre_hook(leave_out)
        return optimizer

    def _full(self, error: OSError) -> UserError:
        return UserError(
            f"{self.dir} cannot be written ({error.strerror}): {self._kept()}, make room and "
            "continue with --resume"
        )

    def _kept(self) -> str:
        there = self.checkpoint.exists()
        return "the last checkpoint is complete" if there else "no checkpoint was written yet"

    def check_finite(self, values: dict[str, float], where: str) -> None:
        """Stop a run at a NaN or infinite loss, and say which checkpoint is left."""
        try:
            check_finite(values, where)
        except UserError as error:
            raise UserError(f"{error}; {self._kept()}") from error

    def begin(self) -> tuple[Meter, int]:
        """An epoch begins, or is gone on with: its meter and the number of its steps that are
        done."""
        meter, inside, self.inside = Meter(self.cfg.on_nan == "skip"), self.inside, None
        if not inside:
            return meter, 0
        meter.load(inside["meter"])
        return meter, inside["step"]

    def due(self) -> bool:
        """Whether to save inside an epoch: a signal arrived, or --save_every has passed."""
        minutes = self.cfg.save_every
        late = minutes is not None and time.perf_counter() - self.kept > 60 * minutes
        if world() > 1:  # all or none
            votes = torch.tensor([self.signals.number or 0, late], dtype=torch.int32)
            dist.all_reduce(votes, dist.ReduceOp.MAX, group=control_group())
            self.signals.number, late = votes[0].item() or None, bool(votes[1])
        return late or self.signals.number is not None

    def pause(self, state, meter: Meter, step: int, where: str) -> None:
        """Save inside an epoch, after `step` of it, what `state()` gives; and stop where a signal
        asked for it. A checkpoint with NaN or infinite numbers is not written."""
        self.check_finite(meter.read(), where)
        self.where = f"after {where}"
        self.save(state(), dict(step=step, meter=meter.state()))

    def save(self, state: dict, inside: dict | None = None, better: bool = False) -> None:
        """Write a checkpoint. `state`: what it holds, `state['weights']` also being what model_best
        holds; `inside`: how far the unfinished epoch is, if there is one."""
        self.due()  # the ranks agree on whether this is the end
        signal_now = self.signals.number
        if inside:
            inside |= dict(seconds=time.perf_counter() - self.began)
        if rank() == 0:
            self._write_checkpoints(state, inside, better)
        self.kept = time.perf_counter()
        if signal_now:
            raise Stopped(signal_now, self.where)

    def _write_checkpoints(self, state: dict, inside: dict | None, better: bool) -> None:
        weights = state.pop("weights")
        scores = {"epoch": len(self.history)}
        row = self.history[-1] if self.history else {}
        for split in ("test", "val"):  # the one that the epochs are evaluated on
            if f"{split}_top1" in row:
                scores |= {"prec@1": row[f"{split}_top1"], "prec@5": row[f"{split}_top5"]}
        everything = dict(
            weights,
            **scores,
            **state,
            rng=rng_state(),
            flags=self._flags(),
            sources=self.sources,
            history=self.history,
            timing=self.timing,
            best=self.best,
            inside=inside,
        )
        try:
            if better:
                save_checkpoint(to_cpu(dict(weights, **scores)), self.dir / "model_best.pth.tar")
            save_checkpoint(to_cpu(everything), self.dir / "checkpoint.pth.tar")
            for logger in self.loggers if not inside else ():
                logger.saved(self.history, self.timing)
        except OSError as error:
            raise self._full(error) from error

    def epoch(
        self, row: dict, speed: float, state: dict, keep_best: bool = True, sharing: int = 1
    ) -> None:
        """An epoch is done: log it, save everything.

        `row`: its metrics; `speed`: training images a second; `state`: as for `save`; `keep_best`:
        whether the epoch may be the best one; `sharing`: the number of runs that share its time.
        """
        now = time.perf_counter()
        seconds, self.began = (now - self.began) / sharing, now
        self.history.append({key: _short(value) for key, value in row.items()})
        self.timing.append(
            dict(row=len(self.history), seconds=round(seconds, 3), train_img_per_s=round(speed, 1))
        )
        self.log(_line(row) + f"  {seconds:6.1f} s  {speed:6.0f} img/s")
        for logger in self.loggers if rank() == 0 else ():
            logger.epoch(self.history, self.timing)
        better = keep_best and row[self.score] > self.best["score"]
        if better:
            self.best = dict(epoch=len(self.history), score=row[self.score])
        self.where = f"after epoch {len(self.history)}"
        self.save(state, better=better)

    def finish(self, tests: dict[str, dict] | None = None) -> dict:
        """Say the result, draw the curves, write result.json: last and best accuracy, the peer's
        too where two networks learned, and the seconds. Returns the same, and the folder.

        tests: where best was chosen on a validation set, the metrics of 'last' and 'best' on the
        test set (`validation.final_tests`)."""
        last = self.history[-1][self.score]
        best, seconds = self.best["score"], sum(row["seconds"] for row in self.timing)
        result = dict(last=last, best=best, seconds=round(seconds, 3))
        peer = [row["peer_test_top1"] for row in self.history if "peer_test_top1" in row]
        if peer:
            result |= dict(peer_last=peer[-1], peer_best=max(peer))
        chosen = "chosen on the test set"
        if tests:
            for which, scores in tests.items():
                self.log(f"{which} on the test set: {_line(scores)}")
                result[which] = _short(scores["test_top1"])
                if "peer_test_top1" in scores:
                    result[f"peer_{which}"] = _short(scores["peer_test_top1"])
            result |= dict(chosen_on="val", val_last=last, val_best=_short(best))
            chosen = f"chosen on the validation set: {best:.2f}"
        self.log(
            f"last {result['last']:.2f}  best {result['best']:.2f} (row {self.best['epoch']}, "
            f"{chosen})  {seconds:.0f} s  {self.dir}"
        )
        if rank() > 0:
            return dict(result, dir=str(self.dir))
        try:
            write_file(self.dir / "result.json", (json.dumps(result) + "\n").encode())
            curves = self.dir / "curves.png"
            draw_curves([self.dir], curves, None, self.loss, self.score)
            for logger in self.loggers:
                logger.finish(result, curves)
        except OSError as error:
            raise self._full(error) from error
        return dict(result, dir=str(self.dir))


def check_finite(values: dict[str, float], where: str) -> None:
    """Raise UserError at a NaN or infinite value, naming the term."""
    if not values:
        raise UserError(f"{where}: every step was skipped because no loss was finite; lower --lr")
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise UserError(
            f"{where}: {', '.join(bad)} is not finite: lower --lr or the method's weight"
        )


def _commit() -> str | None:
    """The project's commit, with + where the files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            git + ["rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(git + ["status", "--porcelain", "-uno"], capture_output=True)
        return head.stdout.strip() + ("+" if dirty.stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _counted(before, now: dict) -> str:
    """How many images there were and are."""
    count = before.get("images") if isinstance(before, dict) else None
    if count == now["images"]:
        return f"{count} images, of other names, sizes or pixels"
    return f"{count} images then, {now['images']} now"


def _finite(value) -> bool:
    return type(value) in (int, float) and bool(np.isfinite(value))


def _tensors(x, key: str = ""):
    """Yield (outermost key, tensor) for every tensor in nested dicts, lists and tuples."""
    if torch.is_tensor(x):
        yield key, x
    elif isinstance(x, (dict, list, tuple)):
        parts = x.items() if isinstance(x, dict) else ((key, value) for value in x)
        for name, value in parts:
            yield from _tensors(value, key or str(name))


def _short(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _line(row: dict) -> str:
    """An epoch's row, aligned."""
    parts = []
    for key, value in row.items():
        if isinstance(value, float):
            value = f"{value:6.2f}" if "top" in key else f"{value:<9.4g}"
        parts.append(f"{key} {value:>3}")
    return "  ".join(parts)


def read_metrics(folder: str | Path) -> list[dict]:
    """The rows of a run's metrics.csv, numbers as floats, empty cells left out."""
    with open(Path(folder) / "metrics.csv", encoding="utf-8") as file:
        return [
            {key: _number(value) for key, value in row.items() if value != ""}
            for row in csv.DictReader(file)
        ]


def _number(text: str):
    try:
        return float(text)
    except ValueError:
        return text


def import_matplotlib():
    """The module, or None. MPLBACKEND chooses a window system, which no figure here needs, and a
    wrong one would fail the import."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    except ImportError:
        return None
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


def draw_curves(
    folders: list[str | Path],
    path: str | Path,
    labels: list[str] | None = None,
    loss: str = "ce",
    score: str = "test_top1",
) -> bool:
    """Two metrics of some runs, row by row, into one figure. False without matplotlib."""
    matplotlib = import_matplotlib()
    if matplotlib is None:
        say("curves not drawn; pip install matplotlib")
        return False
    from matplotlib.figure import (
        Figure,  # not pyplot: no window system, no global state
    )
    from matplotlib.ticker import MaxNLocator

    titles = dict(ce="training cross-entropy", loss="training loss", test_top1="test top-1 (%)")
    titles[VALIDATION] = "validation top-1 (%)"
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = matplotlib.colormaps["tab10"].colors
    for i, folder in enumerate(folders):
        rows = read_metrics(folder)
        label = labels[i] if labels else Path(folder).name
        style = dict(color=colors[i % 10], label=label, marker=".", markersize=4)
        for axis, key in ((left, loss), (right, score)):
            points = [(i, row[key]) for i, row in enumerate(rows, 1) if key in row]
            axis.plot(*zip(*points), **style)
    for axis, key in ((left, loss), (right, score)):
        axis.set(title=titles.get(key, key), xlabel="row of metrics.csv")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    left.set_yscale("log")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return True

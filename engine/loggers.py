"""Where the metrics of a run go: CSV files always, TensorBoard and W&B where a flag asks for them.

All have one small interface, `Logger`. A new one is a class here and a line in `loggers_of`.
"""

import argparse
import csv
import io
import json
import re
import secrets
from contextlib import suppress
from pathlib import Path

from engine.checkpoint import write_file
from engine.console import say
from utils import UserError, first_line


class Logger:
    """What a run tells of itself, in this order; a logger takes what it needs.

    history, timing: a row for each epoch that is done, as in metrics.csv and timing.csv.
    """

    def begin(self, record: dict, history: list[dict], timing: list[dict]) -> str | None:
        """The run begins, or continues after `history`. record: all that args.json holds. Returns
        a line for the log, or None."""

    def epoch(self, history: list[dict], timing: list[dict]) -> None:
        """An epoch is done, and its checkpoint is not written yet: after a kill the epoch comes
        again."""

    def saved(self, history: list[dict], timing: list[dict]) -> None:
        """The checkpoint of these epochs is written."""

    def finish(self, result: dict, curves: Path) -> None:
        """The run is finished. curves: the figure, where it could be drawn."""

    def close(self) -> None:
        """Nothing more comes: the run is finished, stopped or failed."""


def check(cfg: argparse.Namespace) -> None:
    """Raise UserError if a logger cannot be used, before anything is written."""
    if cfg.tensorboard:
        summary_writer()
    if cfg.wandb:
        check_wandb()


def loggers_of(cfg: argparse.Namespace, folder: Path) -> list[Logger]:
    """The loggers of a run in `folder`; nothing is written yet."""
    found = [CSV(folder)]
    found += [TensorBoard(folder)] if cfg.tensorboard else []
    found += [WandB(folder, cfg.wandb)] if cfg.wandb else []
    return found


# --- CSV ------------------------------------------------------------------------------------------


class CSV(Logger):
    """metrics.csv and timing.csv, written again after each checkpoint."""

    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, record: dict, history: list[dict], timing: list[dict]) -> None:
        if history:  # it may have been stopped between the checkpoint and these
            self.saved(history, timing)

    def saved(self, history: list[dict], timing: list[dict]) -> None:
        for name, rows in (("metrics", history), ("timing", timing)):
            write_file(self.folder / f"{name}.csv", _csv(rows).encode())


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- TensorBoard ----------------------------------------------------------------------------------


class TensorBoard(Logger):
    """Event files next to metrics.csv; an epoch is a step."""

    def __init__(self, folder: Path):
        self.folder, self.events = folder, None

    def begin(self, record: dict, history: list[dict], timing: list[dict]) -> None:
        self.events = summary_writer()(self.folder, purge_step=len(history) + 1)

    def epoch(self, history: list[dict], timing: list[dict]) -> None:
        for name, value in _numbers(history[-1]).items():
            self.events.add_scalar(name, value, len(history))
        self.events.flush()

    def close(self) -> None:
        if self.events:
            self.events.close()


def summary_writer():
    """TensorBoard's, or a UserError that says what to install."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from error
    return SummaryWriter


def _numbers(row: dict) -> dict:
    return {name: value for name, value in row.items() if not isinstance(value, str)}


# --- W&B ------------------------------------------------------------------------------------------


class WandB(Logger):
    """A run of W&B: the config with every resolved value, a step for each epoch, the curves.

    Its files and its id (wandb.json) are in the run's folder, so --resume continues the same W&B
    run. WANDB_MODE=offline is honoured; `wandb sync` sends such a run later. A training does not
    end because W&B fails.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.project, self.run = folder, name, None

    def begin(self, record: dict, history: list[dict], timing: list[dict]) -> str:
        wandb = import_wandb()
        known = _known_id(self.folder / "wandb.json", self.project)
        name = known or secrets.token_hex(4)
        if not known:
            about = dict(id=name, project=self.project)
            write_file(self.folder / "wandb.json", (json.dumps(about) + "\n").encode())
        try:
            self.run = wandb.init(
                project=self.project,
                id=name,
                name=self.folder.name,
                dir=self.folder,
                config=config_of(record),
                resume="allow",
                reinit="create_new",  # several students in one process have a run each
                settings=wandb.Settings(console="off", silent=True, save_code=False),
            )
        except Exception as error:
            raise UserError(
                f"--wandb {self.project}: {first_line(error)}; run `wandb login` first, or set "
                "WANDB_MODE=offline, and continue with --resume"
            ) from error
        if not known:  # the epochs before, of a run that had no --wandb
            for n in range(1, len(history) + 1):
                self.epoch(history[:n], timing[:n])
        if self.run is None or self.run.disabled:
            return None
        if self.run.offline:
            place = Path(self.run.dir).parent
            return f"W&B: run {name} of project {self.project}, offline: wandb sync {place}"
        return f"W&B: run {name} of project {self.project}, {self.run.url}"

    def epoch(self, history: list[dict], timing: list[dict]) -> None:
        times = {key: value for key, value in timing[-1].items() if key != "row"}
        self._send(
            lambda run: run.log(_numbers(history[-1]) | times, step=len(history), commit=True)
        )

    def finish(self, result: dict, curves: Path) -> None:
        wandb = import_wandb()
        self._send(lambda run: run.summary.update(result))
        if curves.exists():
            self._send(lambda run: run.log({"curves": wandb.Image(str(curves))}))
        self._send(lambda run: run.finish(exit_code=0))
        self.run = None

    def close(self) -> None:
        self._send(lambda run: run.finish(exit_code=1))
        self.run = None

    def _send(self, what) -> None:
        """`what(run)`; where W&B fails, a warning, and nothing more is sent."""
        try:
            if self.run:
                what(self.run)
        except Exception as error:
            say(f"warning: W&B: {first_line(error)}; nothing more is sent, the training continues")
            self.run = None


def config_of(record: dict) -> dict:
    """What W&B shows as a run's config: the flags, resolved, and next to them what else args.json
    holds."""
    flags = record.get("recipe") or {}
    others = {key: value for key, value in record.items() if key != "recipe"}
    return json.loads(json.dumps(flags | others, default=str))


def _known_id(path: Path, name: str) -> str | None:
    """The id that a W&B run of this project has; None before it began."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["project"] == name and re.fullmatch("[0-9a-z]{1,64}", about["id"]):
            return about["id"]
    return None


def check_wandb() -> None:
    """Raise UserError if the package is missing or nobody is logged in."""
    wandb = import_wandb()
    try:
        ready = wandb.setup().settings.mode not in ("online", "run", "shared")
        ready = ready or wandb.login(prompt=False)
    except TypeError:  # an older one, which asks when the run begins
        ready = True
    except Exception as error:
        raise UserError(f"--wandb: W&B cannot be used ({first_line(error)})") from error
    if not ready:
        raise UserError(
            "--wandb: not logged in; run `wandb login` first, or set WANDB_MODE=offline"
        )


def import_wandb():
    """The module, or a UserError that says what to install."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs a package: pip install wandb") from error
    return wandb

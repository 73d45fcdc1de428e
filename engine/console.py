"""A command: what it prints, and how it ends: a mistake is one line and exit code 2."""

import errno
import functools
import os
import re
import select
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from utils import UserError, out_of_memory, printable, world
import utils


class Stopped(Exception):
    """A run that a signal stopped, its checkpoint written."""

    def __init__(self, number: int, where: str):
        super().__init__(
            f"stopped by {signal.Signals(number).name} {where}: continue with --resume"
        )
        self.signal = number


def command(main):
    """Make `main(argv=None)` a command: a UserError, or what the machine lacks, becomes one line
    and exit code 2. Of several processes, one says it."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
        for stream in (sys.stdout, sys.stderr):  # names that the terminal's encoding lacks
            with suppress(AttributeError):
                stream.reconfigure(errors="backslashreplace")
        try:
            try:
                result = main(argv)
            except SystemExit as stop:  # --help
                _check_stdout()
                raise stop from None
            _check_stdout()
            return result
        except SystemExit:
            raise
        except BaseException as error:
            end = _end_of(error)
            first = _first_to_end()  # before the others see that this process has left
            if end is None and first:
                raise
            line, code = end or ("", 1)  # the others only lose the one that has said why
        finally:
            utils.leave_ranks()
        if first and line:
            with suppress(OSError, ValueError):
                print(line, file=sys.stderr, flush=True)
        raise SystemExit(code) from None

    return run


# errors of the system that are none of the program
MACHINE = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
MACHINE |= {getattr(errno, "EDQUOT", errno.ENOSPC)}  # not on Windows
FEW = {errno.EAGAIN, errno.EMFILE, errno.ENFILE}


def _end_of(error: BaseException) -> tuple[str, int] | None:
    """(line, exit code) for what ends a command; None for a defect of the program."""
    line = re.sub(r"\s*[\r\n]\s*", " ", str(error)).strip()
    if isinstance(error, UserError):
        return printable(f"error: {line}"), 2
    if isinstance(error, Stopped):
        return line, 128 + error.signal
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    line = printable(line.rstrip("."))
    if line.startswith("DataLoader worker"):  # one was killed, wherever we were
        return f"error: {line}: give fewer --workers, or --workers 0", 2
    if out_of_memory(error):
        size = re.search(r"allocate ([\d.]+ \w+)", line)
        more = f" ({size[1]} more were needed)" if size else ""
        return (
            f"error: out of memory{more}: use a smaller --batch_size, --img_size or network, or "
            "--accumulate",
            2,
        )
    if getattr(error, "errno", None) in FEW or "can't start new thread" in line:
        return f"error: the system's limits are too low ({line}): give fewer --workers", 2
    if isinstance(error, OSError):
        try:
            _check_stdout()
        except UserError as full:
            return f"error: {full}", 2
        if isinstance(error, BrokenPipeError) and (_muted or _nobody_reads()):
            _mute()
            return "", 141  # as a shell has it for SIGPIPE
        if error.errno in MACHINE:
            where = printable(str(error.filename or "a file or standard output"))
            return f"error: {where} cannot be used ({error.strerror})", 2
    lost = r"(?i)connection (closed|reset|refused)|broken pipe|gloo|nccl"
    if world() > 1 and isinstance(error, RuntimeError) and re.search(lost, line):
        return f"error: another process has ended ({line[:200]})", 2
    return None


def _first_to_end() -> bool:
    """Whether no other of the processes that torchrun started has ended with a line before."""
    number = os.environ.get("RANK", "0")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    try:  # torchrun's own store, there before the processes and after them
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        wait = timedelta(seconds=5)
        store = dist.TCPStore(*address, is_master=False, timeout=wait)
        return store.add(f"ended {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except Exception:  # another launcher
        if number != "0":
            time.sleep(2)  # the launcher ends us where the first process failed too and has said so
        return True


# --- what is printed -----------------------------------------------------------------------------

_muted = False  # whether standard output is full, or closed at its other end


def say(*lines: str) -> None:
    """Print lines. A training does not end because nobody reads them: its log.txt has them too."""
    for line in lines:
        try:
            print(printable(line), flush=True)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            _mute()
            if not isinstance(error, BrokenPipeError):
                with suppress(OSError, ValueError):
                    print(
                        f"warning: standard output is closed; nothing more is printed ({error})",
                        file=sys.stderr,
                    )


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that is closed at its other end."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # no such call on Windows
        return False


def _mute() -> None:
    """Let standard output lead nowhere."""
    global _muted
    _muted = True
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _check_stdout() -> None:
    """Raise UserError if what was printed cannot be written. Nobody reading it is fine."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _mute()
    except OSError as error:
        _mute()
        raise UserError(f"standard output cannot be written ({error.strerror})") from error
    except ValueError:  # it was closed
        pass

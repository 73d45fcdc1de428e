"""SIGINT and SIGTERM ask a training to end: it finishes the step and saves everything."""

import os
import signal
import threading
import time
from contextlib import suppress

from utils import rank

SAME = 5.0  # seconds within which a SIGTERM repeats the first signal


class Signals:
    """Catches both signals while it is entered, by one run or by several that end together.

    number: the signal that came, or None. A second signal ends the process at once; but a SIGTERM
    soon after a first signal is part of the same request: a cluster sends it to a process and to
    its parent, which ends its children.
    """

    def __init__(self):
        self.number, self._before, self._entered, self._came = None, {}, 0, 0.0

    def __enter__(self) -> "Signals":
        self._entered += 1
        main = threading.current_thread() is threading.main_thread()  # only it may catch them
        if self._entered == 1 and main:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *error) -> None:
        self._entered -= 1
        if self._entered == 0:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _catch(self, number: int, frame) -> None:
        if self.number:
            if number == signal.SIGTERM and time.monotonic() - self._came < SAME:
                return
            raise KeyboardInterrupt
        self.number, self._came = number, time.monotonic()
        if rank() == 0:
            with suppress(OSError):
                os.write(2, b"stopping after this step\n")  # a print may be running now

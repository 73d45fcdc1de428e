"""SIGINT and SIGTERM ask a training to end: it finishes the step and saves everything."""

import os
import signal
import threading
from contextlib import suppress

from utils import rank


class Signals:
    """Catches both signals while it is entered, by one run or by several that end together.

    number: the signal that came, or None. A second signal ends the process at once.
    """

    def __init__(self):
        self.number, self._before, self._entered = None, {}, 0

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
            raise KeyboardInterrupt
        self.number = number
        if rank() == 0:
            with suppress(OSError):
                os.write(2, b"stopping after this step\n")  # a print may be at work just now

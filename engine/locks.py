"""Files that one process holds until it ends, however it ends."""

import errno
import os
import time
from pathlib import Path

NO_LOCKS = errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS  # what such a file system says


class Held(Exception):
    """Another process holds a file; who, as far as it says so."""


def hold(path: Path, patience: float = 0.0):
    """Open a file to append to, locked until it is closed by this process and by those that were
    given it, or they end, however they end. Raises Held where another has it for `patience`
    seconds, OSError where it cannot be written or the file system has no locks."""
    end = time.monotonic() + patience
    while True:
        file = open(path, "a+", encoding="utf-8", errors="replace")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
            file.close()  # one that was removed meanwhile
        except ImportError:  # not on Windows
            return file
        except FileNotFoundError:
            file.close()
        except BlockingIOError as error:
            file.seek(0)
            who = file.readline(200).strip()
            file.close()
            if time.monotonic() >= end:
                raise Held(who) from error
            time.sleep(0.1)
        except OSError:
            file.close()
            raise


def held(path: Path) -> str | None:
    """Which other process holds a file, as far as that is to be known; None: none."""
    try:
        if path.exists():
            hold(path).close()
    except Held as other:
        return str(other) or "it does not say which"
    except OSError:  # of no locks, perhaps
        pass
    return None

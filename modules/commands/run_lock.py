"""One process at a time trains in the folder of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_held: list[int] = []


def take(
    run: Path, name: str = "config.yaml", held: str = "is being trained by another process"
) -> None:
    """Locks a run until `released` ends, or the process, however that ends.

    The lock is on a file that is never replaced, so none is left behind. Windows has no such lock,
    nor have some network disks: there nothing is held.

    Args:
        run: The folder.
        name: Its file to lock.
        held: What is said of a folder that another process has locked.

    Raises:
        ValueError: If another process holds it.
    """
    if sys.platform == "win32":
        return
    path = run / name
    # NFS locks for one alone only what is open for writing.
    file = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
    _held.append(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _held.remove(file)
        os.close(file)
        raise ValueError(f"{run} {held}") from None
    except OSError:  # a disk without locks
        pass


@contextmanager
def released() -> Iterator[None]:
    """Releases at its end what was locked meanwhile."""
    before = len(_held)
    try:
        yield
    finally:
        _close(before)


def _close(kept: int = 0) -> None:
    """Lets go of all locks but the first ones."""
    while len(_held) > kept:
        os.close(_held.pop())


if sys.platform != "win32":
    # Else a worker that loads data would hold the lock of a process that was killed.
    os.register_at_fork(after_in_child=_close)

"""The folder of a compare: one process at a time, and nothing else in it."""

from __future__ import annotations

from pathlib import Path

from ...adapters.replacing import leftovers
from .. import run_lock

MARK = "compare.txt"


def check(out: Path) -> None:
    """Raises if the folder holds something else than a compare."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {out} is a file: give a folder that is free")
    if not out.is_dir() or (out / MARK).is_file():
        return
    if set(out.iterdir()) - set(leftovers(out)):
        raise FileExistsError(f"{out} holds something else than a compare: give a free folder")


def take(out: Path) -> None:
    """Makes the folder, if it is not there, and locks it.

    Raises:
        ValueError: If another process compares in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / MARK).open("a") as mark:  # never replaced: another may hold the lock of the old one
        run_lock.take(out, MARK, "is being written by another compare")
        if not mark.tell():
            mark.write("`litflora compare` writes here; report.html is the page to open\n")

"""The folder of a compare: one process at a time, and nothing else in it."""

from __future__ import annotations

from pathlib import Path

from ...adapters.replacing import replacing
from .. import run_lock

MARK = "compare.txt"


def check(out: Path) -> None:
    """Raises if the folder holds something else than a compare."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {out} is a file: give a folder that is free")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise FileExistsError(f"{out} holds something else than a compare: give a free folder")


def take(out: Path) -> None:
    """Makes the folder, if it is not there, and locks it.

    Raises:
        ValueError: If another process compares in it.
    """
    if not (out / MARK).is_file():
        with replacing(out / MARK) as temporary:
            temporary.write_text(
                "`litflora compare` writes here; report.html is the page to open\n"
            )
    run_lock.take(out, MARK, "is being written by another compare")

"""Files and folders that are whole or not there."""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """Gives a temporary name to write to, which becomes ``path`` if nothing is raised.

    A folder takes the name of none that is there. Folders on the way to it are made.

    Args:
        path: A file or a folder.
        durable: It is on the disk, with all that is in it, before it takes the name: after a loss
            of power, too, it is the old one or the new one. Of many small files that can be made
            again, waiting for the disk takes longer than making them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{get_ident()}{path.suffix}")
    try:
        yield temporary
        if durable:
            for inner in temporary.rglob("*"):  # of a file there are none
                _sync(inner)
            _sync(temporary)
        os.replace(temporary, path)
        if durable:
            _sync(path.parent)
    finally:
        remove(temporary)


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Writes a table in UTF-8, whole or not at all.

    Args:
        path: The file.
        rows: Its rows, the titles first.
    """
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def leftovers(folder: Path) -> list[Path]:
    """What killed processes have left in a folder under temporary names."""
    return [path for path in folder.iterdir() if re.fullmatch(r"\..+\.\d+-\d+(\.\w+)?", path.name)]


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders, and keeps renames itself
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

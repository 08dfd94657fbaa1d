"""The folder of a compare: one process at a time, one recipe, and nothing else in it."""

from __future__ import annotations

import os
from pathlib import Path

from ...adapters.replacing import leftovers
from .. import run_lock

MARK = "compare.txt"
_RECIPE = "recipe "  # what its line in the mark begins with


def check(out: Path, recipe: str) -> None:
    """Raises if the folder cannot be written, or holds something else than a compare of a recipe.

    Args:
        out: The folder, which may not be there.
        recipe: The recipe, as it was asked for.
    """
    there = next(path for path in (out, *out.absolute().parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise NotADirectoryError(
            f"--out {out}: {there} is no folder that can be written to: give another one"
        )
    if there != out:
        return
    if not (out / MARK).is_file():
        if set(out.iterdir()) - set(leftovers(out)):
            raise FileExistsError(f"{out} holds something else than a compare: give a free folder")
    elif (held := _recipe_in(out / MARK)) not in ("", _called(recipe)):
        raise FileExistsError(f"{out} holds a compare of {held}: give another --out")


def take(out: Path, recipe: str) -> None:
    """Makes the folder, if it is not there, locks it, and notes whose it is.

    Raises:
        ValueError: If another process compares in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    # Never replaced: another may hold the lock of the old one.
    with (out / MARK).open("a", encoding="utf-8") as mark:
        run_lock.take(out, MARK, "is being written by another compare")
        if not mark.tell():
            mark.write("`litflora compare` writes here; report.html is the page to open\n")
        if not _recipe_in(out / MARK):
            mark.write(f"{_RECIPE}{_called(recipe)}\n")


def _recipe_in(mark: Path) -> str:
    """The recipe that a mark names; nothing if it names none, as older ones do."""
    lines = mark.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((each.removeprefix(_RECIPE) for each in lines if each.startswith(_RECIPE)), "")


def _called(recipe: str) -> str:
    """What a recipe is called wherever the command is typed."""
    return str(Path(recipe).resolve()) if Path(recipe).is_file() else recipe.removesuffix(".yaml")

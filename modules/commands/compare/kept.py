"""What a run has kept: its results, as far as they can be read, and its adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...adapters.replacing import leftovers, remove, replacing
from ..resume import has_adapter

if TYPE_CHECKING:
    from .plan import Run

FIT, TEST = "fit.json", "test.json"
# The figures that a result file has besides its metric's name.
_FIGURES = {FIT: ("val", "parameters", "saved_bytes", "seconds"), TEST: ("test",)}


def folder_of(out: Path, run: Run) -> Path:
    """The folder of a run, in that of its compare."""
    return out / "runs" / run.name


def read(out: Path, run: Run, name: str) -> dict[str, Any]:
    """A result file of a run; nothing if it is not there, or damaged: it is to be made again."""
    path = folder_of(out, run) / name
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        return {}
    whole = isinstance(found, dict) and isinstance(found.get("metric"), str)
    figures = [found.get(key) for key in _FIGURES[name]] if whole else [None]
    return found if all(isinstance(each, int | float) for each in figures) else {}


def write(out: Path, run: Run, name: str, found: dict[str, Any]) -> None:
    """Writes a result file of a run, whole or not at all."""
    with replacing(folder_of(out, run) / name) as temporary:
        temporary.write_text(json.dumps(found))


def fitted(out: Path, run: Run) -> bool:
    """Whether a fit has left its result, and the adapter that a test of it would read.

    One that has diverged has no adapter, and is never tested.
    """
    fit = read(out, run, FIT)
    return bool(fit) and (not math.isfinite(fit["val"]) or has_adapter(folder_of(out, run)))


def made_otherwise(out: Path, run: Run) -> bool:
    """Whether a run alike in all that its name tells is done, with something else unlike."""
    own = folder_of(out, run)
    named = own.parent.glob(f"{run.short_name}-{'[0-9a-f]' * 12}/{FIT}")
    return any(result.parent != own for result in named)


def sweep(out: Path, runs: Iterable[Run]) -> None:
    """Readies the folder of a compare: what is not fitted is to do, what was left half done goes.

    Args:
        out: The folder, which no other process writes to.
        runs: The runs of the compare.
    """
    left = leftovers(out)
    for run in runs:
        folder = folder_of(out, run)
        if not fitted(out, run):
            left.append(folder / FIT)
        else:  # its process may have been killed before it had removed these
            left += [folder / "checkpoints", *leftovers(folder)]
    for path in left:
        remove(path)

"""The data of a compare: which version of them, and whether they can be compared on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..train import LitFloraCLI


def versions(config: Any) -> dict[str, str]:
    """The version of every file and folder that a config names: the data, the base's weights."""
    named = {str(value) for value in _values(config) if isinstance(value, str)}
    return {name: version(Path(name)) for name in sorted(named) if Path(name).exists()}


def _values(config: Any) -> Iterator[Any]:
    if isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            yield from _values(value)
    else:
        yield config


def version(path: Path) -> str:
    """A hash of the names and sizes of all files below a path.

    What is in them is not read: of a large data set that would take longer than to train on it.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(_below(path))
    for file in files:
        digest.update(f"{os.path.relpath(file, path)} {os.stat(file).st_size}\n".encode())
    return digest.hexdigest()[:12]


def _below(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names)


def check(made: LitFloraCLI, chooses: bool) -> None:
    """Sets the data up as the runs will, so that a mistake shows before the first begins.

    Args:
        made: A model and its data.
        chooses: Whether a rate is to be chosen on the validation data.

    Raises:
        ValueError: If there are no test data, or the same ones choose.
    """
    data = made.datamodule
    if hasattr(made.model, "encoder"):
        data.encoder = made.model.encoder
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    splits = getattr(data, "datasets", {})
    if "test" in splits and not len(splits["test"]):
        raise ValueError("the recipe's data have no test split: a compare ends with one")
    names = [list(getattr(splits.get(split), "names", [split])) for split in ("val", "test")]
    if chooses and names[0] == names[1]:
        raise ValueError(
            "the test split of these data is their validation split, and would choose the rates:\n"
            "give one rate for each tuning, or data with a test split"
        )
    splits.clear()  # the runs set up their own

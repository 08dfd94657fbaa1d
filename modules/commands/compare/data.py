"""The data of a compare: whether they can be compared on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import versions

if TYPE_CHECKING:
    from ..train import LitFloraCLI

_DOES = {"train": "train", "val": "validate", "test": "test"}
_FEW = 100  # of fewer, each moves a share by more than a point


def check_apart(out: Path, data: Mapping[str, Any]) -> None:
    """Raises if the folder of a compare is inside one of the data, and would become a part of them.

    Args:
        out: The folder of the compare.
        data: The settings of the data.
    """
    named = (name for name in versions.values(data) if isinstance(name, str))
    for folder in filter(os.path.isdir, named):
        if out.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(
                f"--out {out} is inside {folder}, and would become a part of the data there:\n"
                "give a folder outside of it"
            )


def check(made: LitFloraCLI, chooses: bool) -> dict[str, int]:
    """Sets the data up as the runs will, so that a mistake shows before the first begins.

    Args:
        made: A model and its data.
        chooses: Whether a rate is to be chosen on the validation data.

    Returns:
        How many samples each split has, as far as the data say so.

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
    sizes = {name: len(samples) for name, samples in splits.items() if hasattr(samples, "__len__")}
    splits.clear()  # the runs set up their own
    return sizes


def told(sizes: Mapping[str, int], trainer: Mapping[str, Any]) -> str:
    """How many samples train, validate and test; a second line warns if few or a part validate.

    Args:
        sizes: How many samples each split has; nothing is told of others.
        trainer: The settings of the trainer, which may limit them.
    """
    limits = {split: trainer.get(f"limit_{split}_batches") for split in _DOES}
    limited = {split: limit for split, limit in limits.items() if str(limit) not in ("None", "1.0")}
    parts = []
    for split, does in _DOES.items():
        less = f" (limit_{split}_batches {limited[split]})" if split in limited else ""
        parts += [f"{sizes[split]:,} {does}{less}"] if split in sizes else []
    line = f"data     {', '.join(parts)}" if parts else ""
    by = "and rates and methods are chosen by them"
    if sizes.get("val", _FEW) < _FEW:
        line += f"\nwarning: only {sizes['val']} validate, {by}"
    elif "val" in sizes and "val" in limited:
        line += f"\nwarning: only a part of those that could validates, {by}"
    return line

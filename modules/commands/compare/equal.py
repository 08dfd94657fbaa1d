"""Whether all runs of a compare have the same data and steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LIMITS = (
    *("fast_dev_run", "barebones", "max_time"),
    *("max_epochs", "min_epochs", "max_steps", "min_steps"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches"),
    *("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch"),
)
# What callbacks would settle that all runs must have alike, or that is swept.
_SETTLES = {
    "BatchSizeFinder": "search for the batch size",
    "LearningRateFinder": "search for the learning rate",
    "EarlyStopping": "choose the length",
}


def check(settings: Mapping[str, dict[str, Any]]) -> None:
    """Raises if budgets differ, or would once runs have begun.

    Args:
        settings: Model, data and trainer of each tuning and rank, by what it is called.

    Raises:
        ValueError: If data settings or limits of the trainer differ, or a callback settles them.
    """
    first, *others = settings
    usual = _budget(settings[first])
    for name in (first, *others):
        _check_callbacks(name, settings[name])
        own = _budget(settings[name])
        for key in {**usual, **own}:
            if own.get(key) != usual.get(key):
                raise ValueError(
                    f"budgets differ: {key} is {own.get(key)} for {name}, and {usual.get(key)} "
                    f"for {first}:\nleave it to the recipe, or give it for all as --{key} VALUE"
                )


def _budget(settings: dict[str, Any]) -> dict[str, Any]:
    trainer, data = settings["trainer"], settings["data"]
    limits = {f"trainer.{key}": trainer.get(key) for key in _LIMITS}
    of_data = {f"data.{key}": value for key, value in data.get("init_args", {}).items()}
    return {**limits, "data": data["class_path"], **of_data}


def _check_callbacks(name: str, settings: dict[str, Any]) -> None:
    for callback in settings["trainer"].get("callbacks") or []:
        kind = callback["class_path"].rpartition(".")[2]
        if kind in _SETTLES:
            raise ValueError(
                f"{kind} would {_SETTLES[kind]} of each run of {name}:\n"
                "leave it out, and compare at what it finds"
            )

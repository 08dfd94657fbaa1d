"""Limits of the trainer under which no run could be chosen or tested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EMPTY = {
    **dict.fromkeys(("max_epochs", "max_steps", "limit_train_batches"), "train"),
    "limit_val_batches": "validate, by which rates are chosen",
    "limit_test_batches": "be tested",
}


def check(trainer: Mapping[str, Any]) -> None:
    """Raises if every run would fail, so that none begins.

    Args:
        trainer: The settings that all runs have alike.

    Raises:
        ValueError: If runs would not train, validate at their end, be tested, or leave an adapter.
    """
    for key, what in _EMPTY.items():
        if trainer.get(key) == 0:
            raise ValueError(f"trainer.{key} is 0: no run would {what}; give more, or leave it out")
    for key in ("fast_dev_run", "barebones"):
        if trainer.get(key):
            raise ValueError(
                f"trainer.{key} leaves no adapter to test: leave it out;\n"
                "--trainer.max_epochs 1 --trainer.limit_train_batches 2 make a compare short"
            )
    if (trainer.get("max_steps") or -1) > 0 or trainer.get("val_check_interval") not in (None, 1):
        raise ValueError(
            "trainer.max_steps and trainer.val_check_interval can end a run after its last "
            "validation,\nby which rates are chosen: give trainer.max_epochs or limit_train_batches"
        )
    every, epochs = trainer.get("check_val_every_n_epoch"), trainer.get("max_epochs")
    if every and epochs and epochs > 0 and epochs % every:
        raise ValueError(
            f"trainer.check_val_every_n_epoch is {every}, and the last of {epochs} epochs would "
            "end without a validation,\nby which rates are chosen: let it divide trainer.max_epochs"
        )


def check_monitored(trainer: Mapping[str, Any], metric: str) -> None:
    """Raises if the weights that are saved would not be those that a rate is chosen by.

    Args:
        trainer: The settings of a run.
        metric: What rates are chosen by.
    """
    for callback in trainer.get("callbacks") or []:
        monitor = (callback.get("init_args") or {}).get("monitor")
        checkpoint = callback["class_path"].endswith("ModelCheckpoint")
        if checkpoint and monitor not in (None, metric):
            raise ValueError(
                f"ModelCheckpoint would keep the weights of the best {monitor}, and rates are "
                f"chosen by {metric}:\nhave it monitor that, or leave it out"
            )

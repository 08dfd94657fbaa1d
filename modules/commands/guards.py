"""What guards every fit of the command line, and what it can go on from."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import CheckpointIO

from ..callbacks import BestCheckpoint, Interruption, LastCheckpoint, NonFinite
from ..checkpoint_io import AtomicCheckpointIO


def callbacks(trainer: Any) -> list[Callback]:
    """The guards, each unless the recipe brings its own, and the checkpoints.

    Args:
        trainer: The trainer's config; a LastCheckpoint in it is taken out, to stand at the end.
    """
    theirs = {type(each) for each in trainer.callbacks or ()}
    found: list[Callback] = [kind() for kind in (NonFinite, Interruption) if kind not in theirs]
    return [*found, *checkpoints(trainer)]


def checkpoints(trainer: Any) -> list[Callback]:
    """The best state, unless the recipe keeps its own, and the last; none if none are wanted."""
    if trainer.enable_checkpointing is False or trainer.barebones:
        return []
    theirs = trainer.callbacks or []
    last = [each for each in theirs if isinstance(each, LastCheckpoint)] or [LastCheckpoint()]
    others = [each for each in theirs if each not in last]
    if theirs:
        trainer.callbacks = others
    kept = any(isinstance(each, ModelCheckpoint) for each in others)
    return [*([] if kept else [BestCheckpoint()]), *last]  # the last knows of the best


def plugins(trainer: Any) -> list[Any]:
    """The recipe's plugins, and checkpoints that are whole or not there."""
    theirs = trainer.plugins or []
    theirs = theirs if isinstance(theirs, list) else [theirs]
    kept = any(isinstance(each, CheckpointIO) for each in theirs)
    return [*theirs, *([] if kept else [AtomicCheckpointIO()])]

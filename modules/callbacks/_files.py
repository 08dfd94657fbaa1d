"""Where callbacks write."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def log_dir(trainer: Trainer) -> Path:
    """The run's folder; must be called on all ranks."""
    return Path(trainer.log_dir or trainer.default_root_dir)

"""Where callbacks write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from ..adapters.replacing import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_dir(trainer: Trainer) -> Path:
    """The run's folder; must be called on all ranks."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def picture_path(data: Any, folder: Path, name: str) -> Path:
    """Where an image's prediction is drawn: ``predictions/a.jpg.png`` for a.jpg.

    Folders below ``predict_root``, or else below the data's ``root``, are kept; of a name that lies
    in neither, the last part.
    """
    root = getattr(data, "predict_root", None) or getattr(data, "root", None)
    relative = Path(name).name if root is None else os.path.relpath(name, root)
    if relative.startswith(os.pardir):
        relative = Path(name).name
    return folder / "predictions" / f"{relative}.png"


def publish(trainer: Trainer, figure: Figure, path: Path, tag: str) -> None:
    """Writes a figure, and shows it to every logger that takes figures or images."""
    with replacing(path, durable=False) as temporary:
        figure.savefig(temporary, bbox_inches="tight")
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # Weights & Biases and its like
            logger.log_image(tag, [str(path)])
        elif hasattr(logger.experiment, "add_figure"):  # TensorBoard
            logger.experiment.add_figure(tag, figure, trainer.global_step)

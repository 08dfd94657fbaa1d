"""Gallery: what the model makes of the same few samples, epoch by epoch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..drawing.base import Drawing, grid, legend
from ._files import log_dir, publish

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Gallery(Callback):
    """Draws ``gallery/epoch_<n>.png`` into the log folder after each validation of a fit.

    Each row is a validation sample beside what the model makes of it and where that is wrong; the
    module's ``drawing`` says how its task shows these. The samples are spread over the validation
    set and stay the same, so that epochs can be compared; ``epoch_000`` is the model before
    training. The picture also goes to every logger that takes figures or images. A datamodule
    without ``datasets``, which litflora's own have, is passed over.

    Args:
        samples: How many samples are drawn.
        every_n_epochs: Draws after every so many epochs; the start is always drawn.
    """

    def __init__(self, samples: int = 4, every_n_epochs: int = 1) -> None:
        if min(samples, every_n_epochs) < 1:
            raise ValueError("a gallery's samples and every_n_epochs must be at least 1")
        self.samples = samples
        self.every_n_epochs = every_n_epochs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what is missing to draw."""
        if find_spec("matplotlib") is None:
            rank_zero_warn("no gallery is drawn: pip install 'litflora[plots]'")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the samples as the model sees them now."""
        data = trainer.datamodule
        epoch = 0 if trainer.sanity_checking else trainer.current_epoch + 1
        drawn = trainer.state.fn == "fit" and epoch % self.every_n_epochs == 0
        if (
            not (hasattr(data, "datasets") and drawn)
            or trainer.fast_dev_run
            or find_spec("matplotlib") is None
        ):
            return
        drawing = pl_module.drawing(data.class_names, getattr(data, "palette", ()))
        chosen = _spread(data.datasets["val"], self.samples)
        with trainer.precision_plugin.val_step_context():  # as the samples are judged
            rows = [_row(drawing, pl_module, sample) for sample in chosen]
        path = log_dir(trainer) / "gallery" / f"epoch_{epoch:03d}.png"
        if trainer.is_global_zero:
            publish(trainer, draw(drawing, rows), path, "val/gallery")


def _spread(dataset: Any, count: int) -> list[Any]:
    """Samples from the whole of a data set, for neighbours are often alike."""
    count = min(count, len(dataset))
    return [dataset[index * len(dataset) // count] for index in range(count)]


def _row(drawing: Drawing, module: Any, sample: Any) -> tuple[Tensor, Any, Any]:
    image, target, _ = drawing.shown(sample)
    with torch.inference_mode():
        return image, target, drawing.predict(module, sample)


def draw(drawing: Drawing, rows: list[tuple[Tensor, Any, Any]]) -> Figure:
    """Draws samples beside what is made of them.

    Args:
        drawing: How the task draws them.
        rows: Images, uint8 ``[3, H, W]``, with their targets and what the model found.
    """
    heights = [image.shape[-2] / image.shape[-1] for image, _, _ in rows]
    figure, axes = grid(heights, len(drawing.columns))
    keys = [drawing.compare(line, *row) for line, row in zip(axes, rows, strict=True)]
    for axis, title in zip(axes[0], drawing.columns, strict=True):
        axis.set_title(title)
    legend(figure, set().union(*keys))
    return figure

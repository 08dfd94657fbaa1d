"""Gallery: what the model makes of the same few samples, epoch by epoch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..losses import IGNORED
from ._files import log_dir, publish

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Palette = list[tuple[int, int, int]]

RIGHT, WRONG, VOID = (216, 232, 216), (200, 30, 30), (160, 160, 160)


class Gallery(Callback):
    """Draws ``gallery/epoch_<n>.png`` into the log folder after each validation of a fit.

    Each row is a validation sample: the image, its true mask, the predicted one, and where the two
    differ. The samples are spread over the validation set and stay the same, so that epochs can be
    compared; ``epoch_000`` is the model before training. The picture also goes to every logger that
    takes figures or images. A datamodule without ``datasets`` and ``palette``, which litflora's own
    have, is passed over.

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
        known = hasattr(data, "datasets") and hasattr(data, "palette")
        if not (known and drawn) or trainer.fast_dev_run or find_spec("matplotlib") is None:
            return
        rows = [self._row(pl_module, sample) for sample in self._chosen(data.datasets["val"])]
        path = log_dir(trainer) / "gallery" / f"epoch_{epoch:03d}.png"
        if trainer.is_global_zero:
            figure = draw(rows, data.class_names, data.palette)
            publish(trainer, figure, path, "val/gallery")

    def _chosen(self, dataset: Any) -> list[Any]:
        """Samples from the whole of the set, for neighbours are often alike."""
        count = min(self.samples, len(dataset))
        return [dataset[index * len(dataset) // count] for index in range(count)]

    def _row(self, pl_module: Any, sample: Any) -> tuple[Tensor, Tensor, Tensor]:
        image, mask, _ = sample
        with torch.inference_mode():
            ids = pl_module.segment(image.to(pl_module.device))
        return image, mask, ids.cpu()


def draw(
    rows: list[tuple[Tensor, Tensor, Tensor]], class_names: list[str], palette: Palette
) -> Figure:
    """Draws images beside their masks.

    Args:
        rows: uint8 image ``[3, H, W]``, true and predicted class ids ``[H, W]``.
        class_names: Names of the classes.
        palette: Their colours.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height, width = rows[0][0].shape[-2:]
    figure = Figure(figsize=(12, 3 * height / width * len(rows) + 1), dpi=100, layout="compressed")
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for axes, (image, truth, ids) in zip(grid, rows, strict=True):
        _show(axes[0], image.permute(1, 2, 0).numpy())
        _show(axes[1], coloured(truth, palette))
        _show(axes[2], coloured(ids, palette))
        _show(axes[3], _errors(truth, ids))
        share = (ids == truth)[truth != IGNORED].float().mean()
        axes[3].set_xlabel(f"{share:.1%} of pixels right")
    for axis, title in zip(grid[0], ("image", "truth", "prediction", "wrong pixels"), strict=True):
        axis.set_title(title)
    present = sorted({int(n) for _, *masks in rows for mask in masks for n in mask.unique()})
    legend = [
        Patch(color=np.array(palette[n]) / 255, label=class_names[n])
        for n in present
        if n < IGNORED
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(legend), 8))
    return figure


def coloured(ids: Tensor, palette: Palette) -> np.ndarray:
    """Class ids ``[H, W]`` in their colours, ``[H, W, 3]`` uint8; ignored pixels are grey."""
    colours = np.full((IGNORED + 1, 3), VOID, np.uint8)
    colours[: len(palette)] = palette
    return colours[ids.numpy()]


def _errors(truth: Tensor, ids: Tensor) -> np.ndarray:
    kinds = torch.where(truth == IGNORED, 2, (truth != ids).long())
    return np.array([RIGHT, WRONG, VOID], np.uint8)[kinds.numpy()]


def _show(axis: Axes, pixels: np.ndarray) -> None:
    axis.imshow(pixels, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])

"""ConfusionMatrix: which classes are taken for which, as a picture."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from ._files import log_dir, publish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Beyond these numbers of classes, counts and then names would be too small to be read.
MOST_COUNTS = 20
MOST_NAMES = 120


class ConfusionMatrix(Callback):
    """Draws ``confusion_matrix.png`` into the log folder at the end of a test.

    The picture also goes to every logger that takes figures or images. Rows are true classes and
    colours are shares of a row; up to 20 classes the counts are written in.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts an empty matrix."""
        if find_spec("matplotlib") is None:
            rank_zero_warn("no confusion matrix is drawn: pip install 'litflora[plots]'")
        self.matrix = MulticlassConfusionMatrix(pl_module.num_classes).to(pl_module.device)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts a batch."""
        self.matrix.update(outputs["probs"], outputs["labels"])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the counts of all processes."""
        counts = self.matrix.compute().cpu()
        path = log_dir(trainer) / "confusion_matrix.png"
        if trainer.fast_dev_run or not trainer.is_global_zero or find_spec("matplotlib") is None:
            return
        figure = draw(counts, pl_module.class_names)
        publish(trainer, figure, path, "test/confusion_matrix")


def draw(counts: Tensor, names: list[str]) -> Figure:
    """Draws a confusion matrix.

    Args:
        counts: ``[true, predicted]``.
        names: Names of the classes.
    """
    from matplotlib.figure import Figure

    n = len(names)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(max(0.45 * n, 4.0), 16.0)
    figure = Figure(figsize=(side, side), dpi=150 if n <= MOST_NAMES else 200)
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, fraction=0.046, label="share of the true class")
    axes.set(
        xlabel="predicted",
        ylabel="true",
        title=f"{int(counts.diag().sum())} of {int(counts.sum())} right",
    )
    if n <= MOST_NAMES:
        size = min(10.0, 45 * side / n)
        axes.set_xticks(range(n), [_short(name) for name in names], rotation=90, fontsize=size)
        axes.set_yticks(range(n), [_short(name) for name in names], fontsize=size)
    if n <= MOST_COUNTS:
        for row in range(n):
            for column in range(n):
                colour = "white" if shares[row, column] > 0.5 else "black"
                text = str(int(counts[row, column]))
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"

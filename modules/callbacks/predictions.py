"""PredictionWriter: the predictions for a folder of images, as a table."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..adapters.replacing import write_csv
from ..processes import gathered
from ._files import log_dir

Row = tuple[str, list[float]]


class PredictionWriter(Callback):
    """Writes ``predictions.csv`` into the log folder at the end of predict.

    Each row holds the path of an image, the name of the likeliest class, and the probability of
    every class under its name. Rows are in the order of the data.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets earlier predictions."""
        self.rows = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps a batch's paths and probabilities."""
        self.rows.extend(zip(outputs["paths"], outputs["probs"].tolist(), strict=True))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the rows of all processes."""
        path = log_dir(trainer) / "predictions.csv"
        rows = gathered(self.rows)
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        names = pl_module.class_names
        cells = (
            (image, names[probs.index(max(probs))], *(f"{p:.6f}" for p in probs))
            for image, probs in rows
        )
        write_csv(path, [("path", "predicted", *names), *cells])
        print(f"{len(rows)} predictions are in {path}")

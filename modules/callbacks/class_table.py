"""ClassTable: how well each class is found."""

from __future__ import annotations

import csv

from lightning.pytorch import Callback, LightningModule, Trainer

from ..adapters.replacing import replacing
from ..adapters.summary import text_table
from ._files import log_dir


class ClassTable(Callback):
    """Prints the intersection over union of each class at the end of a test, worst first.

    It also writes ``class_iou.csv`` into the log folder, in the classes' own order.
    """

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the metric before Lightning resets it."""
        ious = pl_module.test_metrics["iou"].compute().tolist()
        path = log_dir(trainer) / "class_iou.csv"
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        rows = list(zip(pl_module.class_names, ious, strict=True))
        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([("class", "iou"), *((n, f"{iou:.6f}") for n, iou in rows)])
        rows.sort(key=lambda row: row[1])
        lines = text_table(("class", "IoU"), [(name, f"{iou:.3f}") for name, iou in rows])
        print(*lines, sep="\n")

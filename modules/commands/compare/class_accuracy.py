"""ClassAccuracy: how well a classifier finds each class, for the page of a compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ...adapters.replacing import write_csv


class ClassAccuracy(Callback):
    """Writes ``class_accuracy.csv`` at the end of a test, as `ClassTable` does for dense tasks.

    A class's accuracy is the share of its samples that are called by its name. It goes by what
    ``test_step`` returns, ``probs`` and ``labels``; a task that returns something else is passed
    over.
    """

    def __init__(self) -> None:
        self._hits: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps which samples were right."""
        if isinstance(outputs, dict) and {"probs", "labels"} <= outputs.keys():
            labels = outputs["labels"].cpu()
            self._hits.append((labels, outputs["probs"].argmax(-1).cpu() == labels))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes a row for each class; one without samples has nan."""
        if not self._hits or trainer.log_dir is None:
            return
        labels, right = map(torch.cat, zip(*self._hits, strict=True))
        names = pl_module.class_names
        count = torch.bincount(labels, minlength=len(names))
        share = torch.bincount(labels[right], minlength=len(names)) / count
        scores = [f"{each:.6f}" for each in share.tolist()]
        rows = [("class", "accuracy"), *zip(names, scores, strict=True)]
        write_csv(Path(trainer.log_dir) / "class_accuracy.csv", rows)

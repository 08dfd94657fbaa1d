"""ClassTable: how well each class is found."""

from __future__ import annotations

from math import isnan

from lightning.pytorch import Callback, LightningModule, Trainer

from ..adapters.replacing import write_csv
from ..adapters.summary import text_table
from ._files import log_dir


class ClassTable(Callback):
    """Prints the score of each class at the end of a test, worst first, unknown ones last.

    It also writes ``class_<score>.csv`` into the log folder, in the classes' own order. The module
    gives the scores by a method ``class_scores``: the score's name, and a value for each class, nan
    where there is none.
    """

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the scores before Lightning resets the metrics."""
        title, scores = pl_module.class_scores()
        key = title.lower()
        path = log_dir(trainer) / f"class_{key}.csv"
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        rows = list(zip(pl_module.class_names, scores, strict=True))
        write_csv(path, [("class", key), *((name, f"{score:.6f}") for name, score in rows)])
        rows.sort(key=lambda row: (isnan(row[1]), row[1]))
        lines = text_table(("class", title), [(name, f"{score:.3f}") for name, score in rows])
        print(*lines, sep="\n")

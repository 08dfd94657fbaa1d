"""A log of metrics that a resumed run goes on with."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from ..adapters.replacing import replacing


def go_on_with_metrics(logger: CSVLogger, step: int) -> None:
    """Keeps the rows of ``metrics.csv`` below a step, and lets the logger add to them.

    Lightning's logger deletes the file as it opens the folder, so it is kept under another name
    until it is there again.

    Args:
        logger: A logger that has not been used.
        step: The steps that the run goes on from: rows of later ones will be logged again.
    """
    path = Path(logger.log_dir, "metrics.csv")
    kept = path.with_name(".metrics.kept.csv")
    if path.is_file() and not kept.is_file():
        os.replace(path, kept)
    with warnings.catch_warnings():  # that it would delete files
        warnings.simplefilter("ignore")
        experiment = logger.experiment
    if not kept.is_file():
        return
    with kept.open(newline="") as file:
        rows = list(csv.DictReader(file))
    experiment.metrics_keys = list(rows[0]) if rows else []
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, experiment.metrics_keys)
        writer.writeheader()
        writer.writerows(row for row in rows if _below(row, step))
    kept.unlink()


def _below(row: dict[str, str | None], step: int) -> bool:
    """Whether a row is of an earlier step; the last may have been cut off in the middle."""
    whole = None not in row.values() and (row["step"] or "").isdecimal()
    return whole and int(row["step"] or 0) < step

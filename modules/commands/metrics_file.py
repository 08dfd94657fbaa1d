"""A log of metrics that a resumed run goes on with."""

from __future__ import annotations

import csv
import os
import warnings
from itertools import chain, count
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from ..adapters.replacing import replacing


def go_on_with_metrics(logger: CSVLogger, step: int) -> Path | None:
    """Keeps the rows of ``metrics.csv`` below a step, and lets the logger add to them.

    Lightning's logger deletes the file as it opens the folder, so it is kept under another name
    until it is there again.

    Args:
        logger: A logger that has not been used.
        step: The steps that the run goes on from: rows of later ones will be logged again. From 0,
            all are set aside.

    Returns:
        Where the old file is now, if it was set aside: it could not be read, or nothing of it
        would have been kept.
    """
    path = Path(logger.log_dir, "metrics.csv")
    kept = path.with_name(".metrics.kept.csv")
    if path.is_file() and not kept.is_file():
        os.replace(path, kept)
    with warnings.catch_warnings():  # that it would delete files
        warnings.simplefilter("ignore")
        experiment = logger.experiment
    if not kept.is_file():
        return None
    rows = _rows(kept)
    if step == 0 or rows is None:
        aside = _free(
            path.with_name("metrics.damaged.csv" if rows is None else "metrics.before.csv")
        )
        os.replace(kept, aside)
        return aside
    experiment.metrics_keys = list(rows[0]) if rows else []
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, experiment.metrics_keys)
        writer.writeheader()
        writer.writerows(row for row in rows if _below(row, step))
    kept.unlink()
    return None


def _rows(path: Path) -> list[dict[str, str | None]] | None:
    """The rows that have not more fields than the header; None if the file is no log."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            fields = reader.fieldnames or ()
            rows = [row for row in reader if None not in row]
    except (UnicodeDecodeError, csv.Error):
        return None
    return rows if "step" in fields else None


def _free(path: Path) -> Path:
    """The path, or one with a number if it is taken."""
    numbered = (path.with_name(f"{path.stem}.{i}{path.suffix}") for i in count(1))
    return next(each for each in chain([path], numbered) if not each.exists())


def _below(row: dict[str, str | None], step: int) -> bool:
    """Whether a row is of an earlier step; the last may have been cut off in the middle."""
    whole = None not in row.values() and (row["step"] or "").isdecimal()
    return whole and int(row["step"] or 0) < step

"""Runs what is not done yet, one after the other, and keeps what comes out."""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ...adapters.replacing import remove, replacing
from ...callbacks.adapter_folder import best_checkpoint
from .. import train
from ..mistakes import explain
from . import data, results
from .class_accuracy import ClassAccuracy
from .plan import Cell, Run
from .results import FIT, TEST

Show = Callable[[float], None]


class Clock(Callback):
    """Times a training, with its validations, and shows how far it has come.

    Args:
        show: Is told the share that is done.
    """

    def __init__(self, show: Show) -> None:
        self.show = show
        self.seconds = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts: the network and the data are there."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows the step."""
        self.show(trainer.global_step / trainer.estimated_stepping_batches)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops."""
        self.seconds = time.perf_counter() - self._since


def prepare(cells: list[Cell], out: Path) -> dict[str, dict[str, int]]:
    """Builds each model and the data that are still needed, so that mistakes show before a run.

    Returns:
        The figures of the cells that have something left to do, by label.
    """
    undone = [
        cell for cell in cells if not all(results.read(out, run, FIT) for run in cell.all_runs)
    ]
    figures = {cell.all_runs[0].label: cell.figures() for cell in undone}
    if undone:
        data.check(undone[0].made, any(len(cell.runs) > 1 for cell in cells))
    return figures


def run_all(cells: list[Cell], out: Path, figures: dict[str, dict[str, int]]) -> None:
    """Fits all runs, chooses the rates, tests the chosen, and writes the results.

    A run that fails is told and left out. What was done before is not done again.

    Args:
        cells: The cells of the compare.
        out: Its folder.
        figures: Of the cells that have something left to do, by label.

    Raises:
        ValueError: At the end, if runs have failed.
    """
    runs = [run for cell in cells for run in cell.all_runs]
    done = sum(bool(results.read(out, run, FIT)) for run in runs)
    print(f"compare  {len(runs)} runs, {done} found done in {out}", flush=True)
    failed: dict[str, str] = {}
    try:
        with _progress() as progress:
            task = progress.add_task("", total=len(runs), completed=done)
            bar = Bar(progress, task)
            for run in _in_turn(cells):
                if not results.read(out, run, FIT):
                    bar.fit(run, failed, partial(_fit, run, out, figures[run.label], bar.show))
            for run in (run for cell in cells for run in results.chosen_runs(cell, out)):
                if not results.read(out, run, TEST):
                    bar.test(run, failed, partial(_test, run, out))
    finally:
        rows = results.rows(cells, out, failed)
        results.write(rows, out)
    print(results.told(rows, out), flush=True)
    if failed:
        raise ValueError(f"{len(failed)} runs have failed: the same command tries them again")


class Bar:
    """The bar over all runs."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress, self.task = progress, task
        self._done = progress.tasks[task].completed

    def show(self, share: float) -> None:
        """Shows how much of a run is done."""
        self.progress.update(self.task, completed=self._done + min(share, 1.0))

    def fit(self, run: Run, failed: dict[str, str], go: Callable[[], str]) -> None:
        """Fits, and counts the run."""
        self._go(run.short_name, run, failed, go)
        self._done += 1
        self.show(0.0)

    def test(self, run: Run, failed: dict[str, str], go: Callable[[], str]) -> None:
        """Tests."""
        self._go(f"test {run.short_name}", run, failed, go)

    def _go(self, name: str, run: Run, failed: dict[str, str], go: Callable[[], str]) -> None:
        self.progress.update(self.task, description=name)
        line = f"{run.short_name}: {_try(run, failed, go)}"
        self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _progress() -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    left = TimeRemainingColumn(elapsed_when_finished=True)
    # Runs print to their own logs: the bar keeps the terminal.
    return Progress(
        *columns,
        left,
        console=Console(file=sys.stderr),
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _in_turn(cells: list[Cell]) -> Iterator[Run]:
    """All runs, those of a seed together: what slows the machine for a while slows all methods."""
    by_rate = [runs for cell in cells for runs in cell.runs.values()]
    return chain.from_iterable(zip(*by_rate, strict=True))


def _try(run: Run, failed: dict[str, str], go: Callable[[], str]) -> str:
    """What a run says; one that fails is noted, and the others go on."""
    try:
        return go()
    except Exception as error:
        message = explain(error) or f"{type(error).__name__}: {error}"
        failed[run.name] = " ".join(message.split())
        return f"failed: {failed[run.name]}"
    finally:
        gc.collect()  # a Trainer and its module refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _fit(run: Run, out: Path, figures: dict[str, int], show: Show) -> str:
    folder = out / "runs" / run.name
    remove(folder)  # of a run that was killed, or has failed
    clock = Clock(show)
    with _logged(folder):
        cli = train.run("fit", [*run.arguments, "--config", _place(folder)], [clock])
    value, metric = _validated(cli)
    remove(folder / "checkpoints")  # which are for resuming
    found = {"metric": metric, "val": value, "seconds": clock.seconds, **figures}
    _write(folder / FIT, found)
    return f"{metric} {value:.4f} after {clock.seconds:.0f} s"


def _validated(cli: train.LitFloraCLI) -> tuple[float, str]:
    """The metric of the weights that were saved: the last, or the best of the recipe's own."""
    metric = cli.model.monitor
    best = best_checkpoint(cli.trainer)
    if best is not None and best.monitor == metric:
        return float(best.best_model_score), metric
    values = cli.trainer.callback_metrics
    if metric not in values:
        raise ValueError(f"no {metric} was logged: a compare needs a validation after each run")
    return float(values[metric]), metric


def _test(run: Run, out: Path) -> str:
    folder = out / "runs" / run.name
    there = ("--model.adapter", str(folder / "adapter"), "--config", _place(folder / "test"))
    remove(folder / "test")
    with _logged(folder):
        cli = train.run("test", [*run.arguments, *there], [ClassAccuracy()])
    metric = cli.model.monitor.replace("val/", "test/")
    value = float(cli.trainer.callback_metrics[metric])
    _write(folder / TEST, {"metric": metric, "test": value})
    return f"{metric} {value:.4f}"


def _place(folder: Path) -> str:
    """A config that has a run leave all its files in a folder, and show nothing."""
    place = {"save_dir": str(folder.parent), "name": "", "version": folder.name}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": place}
    shown = {"enable_progress_bar": False, "enable_model_summary": False}
    return json.dumps({"trainer": {"logger": logger, "default_root_dir": str(folder), **shown}})


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """What a run prints, warns of and fails with goes to ``log.txt`` in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "log.txt").open("a", encoding="utf-8")
    with file, redirect_stdout(file), redirect_stderr(file):
        try:
            yield
        except Exception:
            traceback.print_exc()
            raise


def _write(path: Path, found: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found))

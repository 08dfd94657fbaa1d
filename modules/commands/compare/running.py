"""Runs what is not done yet, one after the other, and keeps what comes out."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch import Trainer

from ...adapters import AdapterError
from ...adapters.replacing import remove
from ...callbacks import Interruption
from ...callbacks.adapter_folder import best_checkpoint
from ...callbacks.interruption import Interrupted
from .. import train
from . import kept, results
from .bar import Bar, Clock, Show, progress
from .class_accuracy import ClassAccuracy
from .kept import FIT, TEST, folder_of
from .plan import Cell, Run


def prepare(cells: list[Cell], out: Path) -> dict[str, dict[str, Any]]:
    """Builds each model that is still needed, so that mistakes show before a run.

    All are let go of again: of many, memory would not hold those that wait.

    Returns:
        The figures of the cells that have something left to do, by label.
    """
    figures = {}
    for cell in cells:
        if not all(kept.fitted(out, run) for run in cell.all_runs):
            figures[cell.all_runs[0].label] = cell.figures()
        cell.made = None
    return figures


def run_all(cells: list[Cell], out: Path, command: str, figures: dict[str, dict[str, Any]]) -> None:
    """Fits all runs, chooses the rates, tests the chosen, and writes the results.

    A run that fails is told and left out. What was done before is not done again, unless its result
    or its adapter cannot be read. The tables are written after each run, the page at the end,
    however that comes.

    Args:
        cells: The cells of the compare.
        out: Its folder.
        command: What was typed.
        figures: Of the cells that have something left to do, by label.

    Raises:
        ValueError: At the end, if runs have failed.
    """
    runs = [run for cell in cells for run in cell.all_runs]
    kept.sweep(out, runs)
    done = _found_done(runs, out)
    failed: dict[str, str] = {}

    def write() -> None:
        results.write_tables(results.rows(cells, out, failed), out, command)

    try:
        with _stopping_in_order(), progress() as shown:
            tests = sum(len(next(iter(cell.runs.values()))) for cell in cells)
            bar = Bar(shown, len(runs) + tests, done, write)
            for run in _in_turn(cells):
                if not kept.read(out, run, FIT):
                    bar.go("", run, failed, partial(_fit, run, out, figures[run.label], bar.show))
            chosen = [run for cell in cells for run in results.chosen_runs(cell, out, failed)]
            bar.expect(len(runs) + len(chosen))
            for run in chosen:
                if kept.read(out, run, TEST):
                    bar.advance()
                else:
                    bar.go("test ", run, failed, partial(_test, run, out, bar.show))
    except BaseException as error:
        with suppress(Exception):  # it would hide what has happened
            rows = _report(cells, out, command, failed)
            if not isinstance(error, Exception):  # Ctrl-C or a signal
                print(results.stopped(rows, out), flush=True)
        raise
    print(results.told(_report(cells, out, command, failed), out), flush=True)
    if failed:
        raise ValueError(f"{len(failed)} runs have failed: the same command tries them again")


def _found_done(runs: list[Run], out: Path) -> int:
    """Tells how many runs are done, and how many would be but for what else determines a run."""
    todo = [run for run in runs if not kept.read(out, run, FIT)]
    done = len(runs) - len(todo)
    print(f"compare  {len(runs)} runs, {done} found done in {out}", flush=True)
    if others := sum(kept.made_otherwise(out, run) for run in todo):
        what = "with other options, data, libraries or device"
        print(f"         {others} more found {what}: kept, but not taken", flush=True)
    return done


def _report(
    cells: list[Cell], out: Path, command: str, failed: dict[str, str]
) -> list[results.Row]:
    """Writes the tables and the page; returns what they are of."""
    rows = results.rows(cells, out, failed)
    results.write_tables(rows, out, command)
    results.write_page(rows, out, command)
    return rows


@contextmanager
def _stopping_in_order() -> Iterator[None]:
    """SIGTERM ends a compare as Ctrl-C does, also between fits: those have a guard of their own."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted(128 + number)

    if threading.current_thread() is not threading.main_thread():  # no other may
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_turn(cells: list[Cell]) -> Iterator[Run]:
    """All runs, those of a seed together: what slows the machine for a while slows all methods."""
    by_rate = [runs for cell in cells for runs in cell.runs.values()]
    return chain.from_iterable(zip(*by_rate, strict=True))


def _fit(run: Run, out: Path, figures: dict[str, Any], show: Show) -> str:
    folder = folder_of(out, run)
    remove(folder)  # of a run that was killed, has failed, or is damaged
    clock, metric, value, received = Clock(show), figures["metric"], math.nan, 0
    with suppress(FloatingPointError), _logged(folder):  # NonFinite: a result of this rate
        cli = train.run("fit", [*run.arguments, "--config", _place(folder)], [clock])
        value, received = _validated(cli, metric), _received(cli.trainer)
    kept.write(out, run, FIT, {**figures, "val": value, "seconds": clock.seconds})
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # which are for resuming
    if received:
        raise Interrupted(128 + received)
    return f"{metric} {value:.4f} after {clock.seconds:.0f} s"


def _received(trainer: Trainer) -> int:
    """A signal that came in the last validation, too late to end the fit; 0 for none."""
    return max(
        (each.received for each in trainer.callbacks if isinstance(each, Interruption)), default=0
    )


def _validated(cli: train.LitFloraCLI, metric: str) -> float:
    """The metric of the weights that were saved: the last, or the best of the recipe's own."""
    best = best_checkpoint(cli.trainer)
    if best is not None and best.monitor == metric:
        return float(best.best_model_score)
    values = cli.trainer.callback_metrics
    if metric not in values:
        raise ValueError(f"no {metric} was logged: a compare needs a validation after each run")
    return float(values[metric])


def _test(run: Run, out: Path, show: Show) -> str:
    try:
        return _tested(run, out)
    except AdapterError:  # files may be damaged in ways that show when all of them is read
        _fit(run, out, kept.read(out, run, FIT), show)
        return _tested(run, out)


def _tested(run: Run, out: Path) -> str:
    folder = folder_of(out, run)
    there = ("--model.adapter", str(folder / "adapter"), "--config", _place(folder / "test"))
    remove(folder / "test")
    with _logged(folder):
        cli = train.run("test", [*run.arguments, *there], [ClassAccuracy()])
    metric = cli.model.monitor.replace("val/", "test/")
    if metric not in cli.trainer.callback_metrics:
        raise ValueError(
            f"no {metric} was logged: a compare needs a test that logs what is chosen by"
        )
    value = float(cli.trainer.callback_metrics[metric])
    kept.write(out, run, TEST, {"metric": metric, "test": value})
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

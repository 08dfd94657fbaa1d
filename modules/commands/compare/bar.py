"""What a person sees of the runs as they go: a bar, and a line for each."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..mistakes import explain
from .plan import Run

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

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stops: a training that diverges takes its time, too."""
        self.on_train_end(trainer, pl_module)


class Bar:
    """The bar over all fits and tests.

    Args:
        progress: Draws it.
        total: How many there are.
        done: How many were found done.
        write: Is called after each.
    """

    def __init__(
        self, progress: Progress, total: int, done: int, write: Callable[[], None]
    ) -> None:
        self.progress, self.write = progress, write
        self.task = progress.add_task("", total=total, completed=done)
        self._done = done

    def expect(self, total: int) -> None:
        """Takes over how many there are, once that is known."""
        self.progress.update(self.task, total=total)

    def show(self, share: float) -> None:
        """Shows how much of a run is done."""
        self.progress.update(self.task, completed=self._done + min(share, 1.0))

    def advance(self) -> None:
        """Counts one."""
        self._done += 1
        self.show(0.0)

    def go(self, what: str, run: Run, failed: dict[str, str], do: Callable[[], str]) -> None:
        """Fits or tests a run, says what has come out, and counts it."""
        self.progress.update(self.task, description=f"{what}{run.short_name}")
        line = f"{run.short_name}: {_try(run, failed, do)}"
        self.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.advance()
        self.write()


def progress() -> Progress:
    """A bar on stderr."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    left = TimeRemainingColumn(elapsed_when_finished=True)
    # Runs print to their own logs: the bar keeps the terminal.
    return Progress(
        *columns,
        left,
        console=Console(file=sys.stderr),
        redirect_stdout=False,
        redirect_stderr=False,
        speed_estimate_period=3600,  # runs are long, and of the default's 30 s none would be left
    )


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

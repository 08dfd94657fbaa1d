"""Interruption: Ctrl-C and SIGTERM leave a run that can go on."""

from __future__ import annotations

import shlex
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ._files import log_dir
from ._ranks import largest
from .checkpoints import LastCheckpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """Ends a fit, and the process with the exit code of the signal, such as 143 for SIGTERM."""


class Interruption(Callback):
    """On Ctrl-C or SIGTERM, ends the step, saves ``last.ckpt`` and stops.

    A signal to any process stops all. A validation is finished first. A second Ctrl-C stops at
    once. The exit code is 130 after Ctrl-C and 143 after SIGTERM, of the first process: Lightning
    takes that of another for a crash, and kills the rest.

    The handlers only note the signal. Lightning's own handler of SIGTERM talks to the other
    processes, wherever they are, and may wait for them for ever. At the end of a fit Lightning
    gives the signals back to whoever had them.
    """

    def __init__(self) -> None:
        self._received = 0
        self._agreed = 0
        self._run: Path | None = None

    @property
    def received(self) -> int:
        """The signal that has come, also one that came too late to end the fit; 0 for none."""
        return self._received

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the signals of an earlier fit."""
        self._received = self._agreed = 0

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals, as soon as Lightning has."""
        self._install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals where there was no validation before."""
        self._run = log_dir(trainer)  # which all processes must ask for together
        self._install()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks all processes whether to stop; if so, the last checkpoint is due."""
        if trainer.fit_loop.epoch_loop._should_accumulate():  # not public: the step is to be ended
            return
        self._agreed = self._received
        if trainer.world_size > 1:  # one process alone has no device to ask
            device = trainer.strategy.root_device
            self._agreed = int(largest(trainer, torch.tensor(self._received, device=device)))
        if self._agreed:
            for callback in _last(trainer):
                callback.due = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops once the step before has been logged, and validated if that was due."""
        if self._agreed:
            self._stop(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops once the epoch before has been saved."""
        if self._agreed:
            self._stop(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Says how to go on."""
        stopped = isinstance(exception, Interrupted | KeyboardInterrupt)
        if stopped and trainer.is_global_zero and trainer.state.fn == "fit":
            print(self._how_to_go_on(trainer), flush=True)

    def _install(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may
            for number in SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt
        self._received = number

    def _stop(self, trainer: Trainer) -> NoReturn:
        raise Interrupted(128 + self._agreed if trainer.is_global_zero else 0)

    def _how_to_go_on(self, trainer: Trainer) -> str:
        files = [Path(each.format_checkpoint_name({})) for each in _last(trainer)]
        if self._run is None or not any(file.is_file() for file in files):
            return "\ninterrupted before the first checkpoint: nothing is saved"
        run = shlex.quote(str(self._run))
        command = f"litflora fit --resume {run}"
        if not Path(self._run, "config.yaml").is_file():  # a Trainer of one's own
            command = f"trainer.fit(..., ckpt_path={str(files[0])!r})"
        return f"\ninterrupted; {files[0]} is saved, go on with\n    {command}"


def _last(trainer: Trainer) -> list[LastCheckpoint]:
    return [each for each in trainer.checkpoint_callbacks if isinstance(each, LastCheckpoint)]

"""What the finders share: a fit that only searches, and a callback that watches it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.optim import Optimizer

from ._files import log_dir, publish

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Watcher(Callback):
    """Watches the steps of a search.

    Lightning's tuner takes all callbacks out while it searches, but leaves the optimizer: a hook of
    its steps brings this one in.
    """

    @contextmanager
    def watching(self, trainer: Trainer) -> Iterator[None]:
        """Is told of every step of the one optimizer, and of every batch."""
        (optimizer,) = trainer.optimizers

        def before_step(*_: Any) -> None:
            if self not in trainer.callbacks:
                trainer.callbacks.append(self)
            self.on_step(trainer, optimizer)

        hook = optimizer.register_step_pre_hook(before_step)
        try:
            with isolate_rng(), _searching(trainer):
                yield
        finally:
            hook.remove()

    def on_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Called before a step."""


@contextmanager
def _searching(trainer: Trainer) -> Iterator[None]:
    """Epochs without end, and without validation; their losses are nobody's concern."""
    loop = trainer.fit_loop
    epochs, every = loop.max_epochs, trainer.check_val_every_n_epoch
    loop.max_epochs = -1
    if every is not None:  # else validation counts batches, not epochs
        trainer.check_val_every_n_epoch = sys.maxsize
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="train/loss is ")
            yield
    finally:
        loop.max_epochs, trainer.check_val_every_n_epoch = epochs, every
        trainer.ckpt_path = None  # else the fit would pass for one resumed from the tuner's file


def remember(holder: LightningModule | Any, name: str, value: Any) -> None:
    """Sets what was found as if it had been given, so that what a run leaves tells it."""
    setattr(holder, name, value)
    holder.hparams[name] = value


def tell(trainer: Trainer, name: str, value: float, text: str) -> None:
    """Prints what was found, and logs it."""
    if trainer.is_global_zero:
        print(text, flush=True)
    for logger in trainer.loggers:
        logger.log_metrics({name: value}, step=trainer.global_step)


def picture(trainer: Trainer, name: str, draw: Any, *found: Any) -> None:
    """Draws ``name.png`` into the log folder, where matplotlib is there."""
    path = log_dir(trainer) / f"{name}.png"
    if not trainer.is_global_zero:
        return
    if find_spec("matplotlib") is None:
        rank_zero_warn(f"no {path.name} is drawn: pip install 'litflora[plots]'")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    figure: Figure = draw(*found)
    publish(trainer, figure, path, name)

"""BatchSizeFinder: a fit with the largest batches that memory holds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer, callbacks
from torch.optim import Optimizer

from ._search import Watcher, picture, remember, tell

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class BatchSizeFinder(callbacks.BatchSizeFinder):
    """Searches the batch size before a fit, which then goes on with it from where it was.

    Lightning doubles the data's ``batch_size`` until memory does not hold a step, a bound is
    reached, or a batch has the whole training set. The largest that took all steps of its trial is
    taken, and optimizer and schedule are set up for it. Images per second are printed for each
    size, and ``batch_size_finder.png`` in the log folder shows them and, on a GPU, the peak of
    memory. A run that is resumed goes on with the size that was found.
    """

    def __init__(
        self, mode: str = "power", steps_per_trial: int = 3, init_val: int = 2, max_val: int = 256
    ) -> None:
        """Sets the search.

        Args:
            mode: "power" doubles; "binsearch" goes on between the last two sizes once memory is
                exceeded.
            steps_per_trial: Steps of each size. The first one is left out of the time.
            init_val: The first size.
            max_val: The bound. Without a GPU nothing else ends the search but the training set.
        """
        if steps_per_trial < 2:
            raise ValueError(f"steps_per_trial must be at least 2, not {steps_per_trial}")
        if not 1 <= init_val <= max_val:
            raise ValueError(f"init_val must lie between 1 and max_val {max_val}, not {init_val}")
        # A bound of Lightning's is taken untried, and its margin would be taken off twice.
        super().__init__(mode, steps_per_trial, init_val, margin=0.0, max_val=max_val + 1)
        self.found: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot be searched, before anything is."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Searches, and sets loaders, optimizer and schedule up anew."""
        if trainer.fast_dev_run:
            return
        if trainer.ckpt_path is not None:
            if self.found is not None:
                use(trainer, self.found)
            return
        trials = self._search(trainer, pl_module)
        self.found = max(trials)
        use(trainer, self.found)
        rates = ", ".join(f"{trial.rate:.0f} ({size})" for size, trial in trials.items())
        text = f"batches  of {self.found}; images/s by size: {rates}"
        tell(trainer, "batch_size_finder/batch_size", self.found, text)
        picture(trainer, "batch_size_finder", draw, trials, self.found)

    def _search(self, trainer: Trainer, pl_module: LightningModule) -> dict[int, Trial]:
        """The trials that were not cut short, by size in ascending order."""
        watched = Trials()
        # Lightning would make its first trial with batches as large as they were before.
        use(trainer, self._init_val)
        try:
            with watched.watching(trainer):
                self.scale_batch_size(trainer, pl_module)
        except ValueError:
            if min(watched.trials, default=0) > 1:
                raise
        # Else the data have refused a size of 0, to which Lightning has gone down.
        most = len(trainer.train_dataloader.dataset)
        whole = {
            min(size, most): trial
            for size, trial in sorted(watched.trials.items())
            if trial.steps >= self._steps_per_trial
        }
        if not whole:
            raise ValueError(f"a batch of {min(watched.trials)} does not fit in memory")
        return whole

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Searches in a fit only."""

    on_test_start = on_predict_start = on_validation_start

    def state_dict(self) -> dict[str, Any]:
        """What was found."""
        return {"batch_size": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what was found."""
        self.found = state_dict["batch_size"]


@dataclass
class Trial:
    """What the steps of one size took.

    Attributes:
        steps: How many of them memory has held.
        images: In all batches but the first.
        seconds: From the end of the first batch to that of the last, loading included.
        peak: The most bytes that a GPU has held.
    """

    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    peak: int = 0

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds


class Trials(Watcher):
    """The trials of a search, by size of the batch."""

    def __init__(self) -> None:
        self.trials: dict[int, Trial] = {}
        self._since: float | None = None

    def on_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Begins a trial where the size is a new one."""
        self._trial(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Counts a batch."""
        trial = self._trial(trainer)
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
            trial.peak = torch.cuda.max_memory_allocated(pl_module.device)
        now = time.perf_counter()
        if self._since is not None:
            trial.images += len(batch[0])
            trial.seconds += now - self._since
        trial.steps, self._since = trainer.global_step, now

    def _trial(self, trainer: Trainer) -> Trial:
        size = trainer.datamodule.batch_size
        if size not in self.trials:
            self.trials[size], self._since = Trial(), None
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        return self.trials[size]


def use(trainer: Trainer, size: int) -> None:
    """Sets the size of batches, and makes all that depends on it."""
    remember(trainer.datamodule, "batch_size", size)
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop):
        loop._combined_loader = None  # no public way makes loaders anew; Lightning's tuner does so
    trainer.fit_loop.setup_data()
    trainer.strategy.setup_optimizers(trainer)  # the schedule counts steps


def draw(trials: dict[int, Trial], best: int) -> Figure:
    """Draws images per second and, if it was measured, the peak of memory.

    Args:
        trials: The trials, by size of the batch.
        best: The size that is taken.
    """
    from matplotlib.figure import Figure

    sizes = list(trials)
    curves = {"images/s": [trial.rate for trial in trials.values()]}
    if any(trial.peak for trial in trials.values()):
        curves["peak of GPU memory, GiB"] = [trial.peak / 2**30 for trial in trials.values()]
    figure = Figure(figsize=(7, 3.5 * len(curves)), dpi=120, layout="constrained")
    rows = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axes, (label, values) in zip(rows, curves.items(), strict=True):
        axes.plot(sizes, values, "o-", color="tab:blue")
        axes.plot(best, values[sizes.index(best)], "o", color="tab:red", label=f"taken, {best}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
    rows[0].legend()
    rows[0].set_title("batch-size finder")
    rows[-1].set_xlabel("batch size")
    return figure

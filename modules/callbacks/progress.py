"""RateProgressBar: Lightning's Rich progress bar, with images per second, and lines for a log."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class RateProgressBar(RichProgressBar):
    """Shows how many images a second are trained on, over all processes."""

    _images = 0
    _seconds = 0.0
    _since = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to count anew."""
        super().on_train_epoch_start(trainer, pl_module)
        self._images, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the images of a batch and the time since the last one, loading included."""
        now = time.perf_counter()
        rows = batch["input_ids"] if isinstance(batch, dict) else batch[0]
        self._images += len(rows) * trainer.world_size
        self._seconds += now - self._since
        self._since = now
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints a line where nobody sees the bar move, as in a log file."""
        super().on_train_epoch_end(trainer, pl_module)
        console = self._console
        if self.is_enabled and console is not None and not console.is_terminal:
            metrics = self.get_metrics(trainer, pl_module)
            told = [f"{name} {_short(value)}" for name, value in metrics.items()]
            print(f"epoch    {trainer.current_epoch}: {', '.join(told)}", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the validation out of the time."""
        super().on_validation_end(trainer, pl_module)
        self._since = time.perf_counter()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Adds the rate to the metrics that the module logs."""
        metrics = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        if self._seconds and trainer.training:
            metrics["images/s"] = f"{self._images / self._seconds:.0f}"
        return metrics


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

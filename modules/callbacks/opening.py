"""Opening: what a run works on, said before it begins."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class Opening(Callback):
    """Prints the sizes of the splits, the classes, and what trains.

    A datamodule says what it holds by a method ``contents``; one without is passed over.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells of data and tuning."""
        self._tell(trainer, self._data(trainer), self._tuning(pl_module), self._processes(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells of the data, if this is no part of a fit."""
        if trainer.state.fn == "validate":
            self._tell(trainer, self._data(trainer))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells of the data."""
        self._tell(trainer, self._data(trainer))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells of the data."""
        self._tell(trainer, self._data(trainer))

    def _tell(self, trainer: Trainer, *lines: str) -> None:
        if trainer.is_global_zero:
            print(*filter(None, lines), sep="\n", flush=True)

    def _data(self, trainer: Trainer) -> str:
        datamodule = getattr(trainer, "datamodule", None)
        return f"data     {datamodule.contents()}" if hasattr(datamodule, "contents") else ""

    def _processes(self, trainer: Trainer) -> str:
        strategy = type(trainer.strategy).__name__.removesuffix("Strategy")
        told = f"process  {trainer.world_size} by {strategy}, each with its own batches"
        return told if trainer.world_size > 1 else ""

    def _tuning(self, pl_module: LightningModule) -> str:
        found = pl_module.tuned  # of the net as it was before processes shared it out
        named = pl_module.tunings().items()
        method = ", ".join(f"{part} {type(tuning).__name__}".strip() for part, tuning in named)
        weights = f"{len(found.rows)} weights adapted, " if found.rows else ""
        trained = f"{found.trainable:,} parameters train"
        share = f"{found.trainable / found.total:.1%} of the base's"
        return f"tuning   {method}: {weights}{trained} ({share})"

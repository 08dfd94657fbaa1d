"""EMA: the moving average of what trains."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.optim.swa_utils import get_ema_multi_avg_fn

if TYPE_CHECKING:  # a task imports its callbacks, not they the task
    from ..module import TuningModule

FACTORIES = ("optimizer_factory", "scheduler_factory")


class EMA(WeightAveraging):
    """Evaluates and saves the exponential moving average of the weights that train.

    After every step the average moves towards the weights by a share of ``1 - decay``; buffers, as
    running statistics are, stay the model's own. Validation, checkpoints, the adapter's folder and
    the module after a fit have the average; a checkpoint has the weights of the last step besides,
    under ``current_model_state``, for a run that goes on.

    It is Lightning's callback for a module whose checkpoints lack the frozen base. Frozen weights
    are held once.
    """

    def __init__(self, decay: float = 0.999) -> None:
        """Sets the average's memory.

        Args:
            decay: Share of the average that a step keeps: it remembers about ``1 / (1 - decay)``
                steps.
        """
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), not {decay}")
        # This function leaves equal numbers equal bit for bit, and so a frozen base.
        super().__init__(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the average as a copy of the module, but for what makes optimizer and schedule.

        On the command line those lead to the data and the trainer, and its processes.

        Raises:
            ValueError: The processes share the model out; the copy would be one of parts.
        """
        if isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy):
            raise ValueError(
                "EMA keeps a second copy of what trains, and cannot of a sharded model: take "
                "trainer.strategy ddp, or leave trainer/ema out"
            )
        factories = {name: vars(pl_module)[name] for name in FACTORIES}
        vars(pl_module).update(dict.fromkeys(FACTORIES))
        super().setup(trainer, pl_module, stage)
        vars(pl_module).update(factories)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the average to the weights, which have reached their device; shares the base."""
        assert self._average_model is not None
        average = self._average_model.module
        for mean, own in zip(_tensors(average), _tensors(pl_module), strict=True):
            mean.data = mean.data.to(own) if own.requires_grad else own.data

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the average in place for callbacks that draw with it."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the weights of the last step back, before they are saved."""
        super().on_validation_epoch_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the average in the module also after a fit that was resumed at its end."""
        self._copy_average_to_current(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: TuningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Drops the frozen base, as the module does, from the current weights too."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        frozen = pl_module.frozen_keys()
        current = checkpoint.get("current_model_state", {})
        for key in frozen & current.keys():
            del current[key]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: TuningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Completes the average with the frozen base, without which Lightning would not load it."""
        frozen, state = pl_module.frozen_keys(), pl_module.state_dict()
        checkpoint["state_dict"] |= {key: state[key] for key in frozen}
        super().on_load_checkpoint(trainer, pl_module, checkpoint)


def _tensors(module: Any) -> Any:
    return itertools.chain(module.parameters(), module.buffers())

"""LISA: full tuning of a few blocks at a time."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, strategies
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.modules.batchnorm import _BatchNorm

from ._units import (
    SAMPLINGS,
    Sampling,
    Unit,
    check_whole,
    choice_sizes,
    choose,
    find_units,
    forget,
    lower_rates,
    rest,
    size_of,
    state_sizes,
    wake,
)

if TYPE_CHECKING:  # a task imports its callbacks, not they the task
    from ..module import TuningModule

# AdamW's first step with new moments is as large as the rate, whatever the gradient.
FEWEST = 5


class LISA(Callback):
    """Trains a few blocks at a time, and everything outside of blocks always, under ``Full``.

    Layerwise importance sampled AdamW (Pan et al., arXiv 2403.17919): every ``interval`` steps of
    the optimizer, ``active`` of the blocks are drawn, uniformly and without replacement. The others
    are frozen; they have neither gradients nor, with ``reset_state``, optimizer state. Blocks are
    what timm's ``group_matcher`` says, the tower's and the language model's alike; a downsampling
    belongs to the block that follows it, and blocks that the tuning leaves frozen are none. Any
    optimizer will do that keeps its state by parameter.

    Blocks are frozen during a step only. Whatever asks between two steps what trains, as
    checkpoints and the adapter's folder do, finds full tuning: all blocks have been trained.

    Each period logs ``lisa/trainable_parameters``, ``lisa/optimizer_bytes`` after its first step,
    and the numbers of its blocks as ``lisa/active_0`` and so on. The first one also prints what
    state and gradients take on average and at most.

    Attributes:
        names: The blocks that train now.
        switched_at: The step at which they were drawn, None before the first draw.
    """

    def __init__(
        self,
        active: int = 2,
        interval: int = 20,
        sampling: Sampling = "uniform",
        seed: int | None = None,
        reset_state: bool = True,
        warmup: int = 0,
        units: list[str] | None = None,
    ) -> None:
        """Sets the sampling; the paper's names are in brackets.

        Args:
            active: Blocks that train at a time (gamma).
            interval: Steps of the optimizer from draw to draw (K).
            sampling: ``uniform``; ``stage``, a second block of a stage only once all other stages
                have one; or ``param_budget``, as many as have the parameters of ``active`` blocks
                of average size, or a single one that has more.
            seed: Of the draws; None is the run's.
            reset_state: Drop the optimizer state of blocks that are frozen. Without, memory grows
                to that of full tuning.
            warmup: Steps after each draw in which the learning rates rise to the schedule's.
            units: Globs of names of modules that take turns, in place of the blocks.
        """
        for name, value in (("active", active), ("interval", interval)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 <= warmup < interval:
            raise ValueError(f"warmup must lie in [0, interval {interval}), not {warmup}")
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling is {', '.join(SAMPLINGS)}, not {sampling!r}")
        if reset_state and interval < FEWEST:
            rank_zero_warn(
                f"interval {interval} leaves the optimizer no time to gather moments, which each "
                f"draw resets: take {FEWEST} or more"
            )
        self.active = active
        self.interval = interval
        self.sampling = sampling
        self.seed = seed
        self.reset_state = reset_state
        self.warmup = warmup
        self.units = units
        self._begin()

    def _begin(self) -> None:
        self.names: list[str] = []
        self.switched_at: int | None = None
        self._random = random.Random()
        self._units: list[Unit] = []
        self._norms: list[_BatchNorm] = []
        self._share = 1.0
        self._untold = self._unlogged = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses strategies under which blocks cannot be frozen, and begins anew."""
        if stage == "fit":
            _check_strategy(trainer.strategy)
            self._begin()

    def on_fit_start(self, trainer: Trainer, pl_module: TuningModule) -> None:
        """Finds the blocks.

        Raises:
            ValueError: There are too few, or one does not train whole.
        """
        assert pl_module.net is not None
        found = find_units(pl_module.net, self.units)
        if self.units is None:  # a part of the network may be frozen for good
            found = [u for u in found if any(p.requires_grad for p in u.parameters.values())]
        check_whole(found, trainer.optimizers)
        names = [unit.name for unit in found]
        if len(found) < self.active:
            raise ValueError(
                f"LISA.active is {self.active}, and {len(found)} blocks train: lower it, or take "
                f"model.tuning litflora.adapters.Full ({', '.join(names) or 'none'})"
            )
        if not set(self.names) <= set(names):
            raise ValueError(
                f"LISA goes on with {', '.join(self.names)}, which a checkpoint names, and has "
                f"{', '.join(names)}: give it the units of before"
            )
        self._units = found
        compiled = any(module._compiled_call_impl is not None for module in pl_module.modules())
        if compiled or pl_module._compiler_ctx is not None:
            rank_zero_warn("LISA has torch.compile compile anew for each set of blocks it draws")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the first blocks, unless a checkpoint has brought some."""
        if self.switched_at is None:
            run = trainer.strategy.broadcast(torch.initial_seed())  # the same draws in all
            self._random.seed(run if self.seed is None else self.seed)
            self._draw(trainer)
        if self.warmup:
            for optimizer in trainer.optimizers:
                lower_rates(optimizer, lambda: self._share)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draws if a period is over, and freezes what is not drawn for the time of the step."""
        step = trainer.global_step  # stands still while batches are accumulated
        assert self.switched_at is not None
        if step % self.interval == 0 and step != self.switched_at:
            self._draw(trainer)
        self._share = min((step - self.switched_at + 1) / (self.warmup + 1), 1.0)
        self._norms = rest(self._resting())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Wakes what was frozen; logs after the first step of a period."""
        self._wake()
        if self._unlogged and trainer.global_step != self.switched_at:
            self._unlogged = False
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wakes what was frozen if a hook has ended the epoch within a step."""
        self._wake()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Wakes what was frozen, before a checkpoint may be written."""
        self._wake()

    def _wake(self) -> None:
        wake(self._units, self._norms)
        self._norms = []

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the network."""
        self._units = []

    def state_dict(self) -> dict[str, Any]:
        """The period, and the state of the draws."""
        period = {"names": self.names, "switched_at": self.switched_at}
        return {**period, "random": self._random.getstate()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the period over."""
        self.names, self.switched_at = state_dict["names"], state_dict["switched_at"]
        self._random.setstate(state_dict["random"])
        self._unlogged = False

    def _draw(self, trainer: Trainer) -> None:
        order = self._random.sample(self._units, len(self._units))
        drawn = choose(order, self.active, self.sampling)
        self.names = [unit.name for unit in self._units if unit in drawn]
        self.switched_at = trainer.global_step
        self._unlogged = True
        if self.reset_state:
            forget(self._resting(), trainer.optimizers)

    def _resting(self) -> list[Unit]:
        return [unit for unit in self._units if unit.name not in self.names]

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        everything = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        resting = sum(p.numel() for unit in self._resting() for p in unit.parameters.values())
        numbers = [i for i, unit in enumerate(self._units) if unit.name in self.names]
        told = {
            "lisa/trainable_parameters": everything - resting,
            "lisa/optimizer_bytes": state_sizes(trainer.optimizers)[0],
            **{f"lisa/active_{i}": number for i, number in enumerate(numbers)},
        }
        for logger in trainer.loggers:  # beside what Lightning logs of the step
            logger.log_metrics(told, step=trainer.global_step - 1)
        if self._untold and trainer.is_global_zero:
            print(self._forecast(trainer, pl_module), flush=True)
        self._untold = False

    def _forecast(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Bytes of state and gradients, on average and at most, as the optimizer keeps state."""
        state, of = state_sizes(trainer.optimizers)
        whole = size_of(p for p in pl_module.parameters() if p.requires_grad)
        blocks = sum(unit.size for unit in self._units)
        mean, most = choice_sizes(self._units, self.active, self.sampling)

        def megabytes(drawn: float) -> str:
            trained = whole - blocks + drawn
            kept = trained if self.reset_state else whole
            return f"{(trained + kept * state / max(of, 1)) / 1e6:,.1f} MB"

        return (
            f"lisa     {len(self.names)} of {len(self._units)} blocks train at a time: optimizer "
            f"state and gradients take {megabytes(mean)} on average, {megabytes(most)} at most, "
            f"{megabytes(blocks)} in full tuning"
        )


def _check_strategy(strategy: strategies.Strategy) -> None:
    """Raises unless parameters may be frozen and freed under a strategy."""
    kind = type(strategy).__name__
    ddp = isinstance(strategy, strategies.DDPStrategy)
    ddp = ddp and not isinstance(strategy, strategies.DeepSpeedStrategy)  # which derives from it
    options = strategy._ddp_kwargs if ddp else {}  # nothing public tells them
    if options.get("static_graph"):
        raise ValueError(f"LISA changes what trains: leave static_graph out of {kind}")
    alone = isinstance(strategy, strategies.SingleDeviceStrategy)
    if not (alone or options.get("find_unused_parameters")):
        raise ValueError(
            f"LISA freezes blocks in turns, and {kind} as it is cannot follow: take a single "
            "device, or trainer.strategy ddp_find_unused_parameters_true"
        )

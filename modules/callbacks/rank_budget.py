"""RankBudget: the ranks of AdaLoRA and FLoRA fall to a budget while they train."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from ..adapters.adalora import orthogonality, singular_factors
from ..adapters.budget import BudgetSchedule, RankAllocator, check_betas
from .checkpoints import BestCheckpoint


class RankBudget(Callback):
    """Takes slices of AdaLoRA's and FLoRA's deltas away until a budget is met.

    Every step's gradients score the slices of all layers together, as AdaLoRA does
    (arXiv 2303.10512, see `litflora.adapters.budget`); the best ones stay. The budget falls with
    the cube of the time left, between a warm-up and a last part of the run, in which what is left
    is trained. ``train/rank_slices`` is logged. The adapter's folder has smaller ranks, layer by
    layer, and no delta where nothing is left. Where a ModelCheckpoint of one's own keeps the best
    weights, these may be of before the budget is met.

    The scores see gradients as they are averaged over processes and batches, and before they are
    clipped, at the weights that they belong to (PEFT multiplies them by the weights after the
    step).
    """

    def __init__(
        self,
        target: float = 0.5,
        warmup: float = 0.15,
        final: float = 0.5,
        interval: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orthogonality: float = 0.1,
    ) -> None:
        """Sets the budget; shares of the run are about those of the authors' examples.

        Args:
            target: The budget: below 1 the share of all slices, from 1 on the mean rank, which is
                over weights with AdaLoRA, and over all modes with a factor with FLoRA.
            warmup: Share of the run before the budget falls.
            final: Share of the run after it has fallen.
            interval: Steps of the optimizer from one allocation to the next.
            beta1: Share of the smoothed sensitivity that a step keeps.
            beta2: The same for the uncertainty.
            orthogonality: Weight of AdaLoRA's orthogonality term: 0.1 in the authors' code, 0.5 in
                PEFT. FLoRA has none.
        """
        if not target > 0:
            raise ValueError(f"target must be above 0, not {target}")
        if min(warmup, final) < 0 or warmup + final >= 1:
            raise ValueError(
                f"warmup and final are shares of the run that leave some of it: not {warmup} and "
                f"{final}"
            )
        if interval < 1:
            raise ValueError(f"interval must be at least 1, not {interval}")
        check_betas(beta1, beta2)
        if orthogonality < 0:
            raise ValueError(f"orthogonality must be 0 or more, not {orthogonality}")
        self.target = target
        self.warmup, self.final, self.interval = warmup, final, interval
        self.betas = beta1, beta2
        self.orthogonality = orthogonality
        self.allocator: RankAllocator | None = None
        self.schedule: BudgetSchedule | None = None
        self._state: dict[str, Any] = {}
        self._stepped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the slices, and plans the run.

        Raises:
            ValueError: Nothing here can have a budget, or not this one.
        """
        _check(trainer)
        self.allocator = RankAllocator(pl_module, *self.betas)
        if self._state:
            self.allocator.load_state_dict(self._state)
            self._state = {}  # a later fit begins anew
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("RankBudget needs the length of the run: set trainer.max_epochs")
        warmup, final = int(self.warmup * steps), int(self.final * steps)
        self.schedule = BudgetSchedule(
            self.allocator.size,
            self._last(self.allocator),
            int(steps),
            warmup,
            final,
            self.interval,
        )

    def _last(self, allocator: RankAllocator) -> int:
        size, least = allocator.size, allocator.least
        last = round(self.target * (size if self.target < 1 else allocator.modes))
        if not max(1, least) <= last < size:
            raise ValueError(
                f"target {self.target:g} is {last} slices of {size}: take one that leaves fewer "
                f"than these, and at least {max(1, least)}, or start with a higher rank"
            )
        return last

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Adds the orthogonality term's gradient, and scores the slices."""
        assert self.allocator is not None
        assert self.schedule is not None
        self._stepped = True
        scale = _scale(trainer, optimizer)
        if self.orthogonality:
            _pull(pl_module, self.orthogonality * scale)
        step = trainer.global_step + 1
        if step > self.schedule.end:
            self.allocator.mask_gradients()
        elif step < self.schedule.end and _are_finite(optimizer):
            self.allocator.update(scale)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Allocates the budget and masks, if the batch has ended a step.

        That is before anything is evaluated or saved, and not between a forward and its backward.
        """
        if not self._stepped:
            return
        assert self.allocator is not None
        assert self.schedule is not None
        self._stepped = False
        due, step = self.schedule.due(trainer.global_step), trainer.global_step
        if due:
            self.allocator.allocate(self.schedule(step))
        if due or step > self.schedule.end:
            self.allocator.mask()
        pl_module.log("train/rank_slices", float(self.allocator.budget))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so if the training was too short."""
        assert self.schedule is not None
        if trainer.global_step < self.schedule.end:
            rank_zero_warn(
                f"training ended at step {trainer.global_step}: the rank budget would have been "
                f"met at step {self.schedule.end}"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Says what is left, after the progress bar has gone."""
        if stage == "fit" and self.allocator is not None and trainer.is_global_zero:
            kept, size, modes = self.allocator.budget, self.allocator.size, self.allocator.modes
            print(f"budget   {kept} of {size} slices are left, a mean rank of {kept / modes:.1f}")

    def state_dict(self) -> dict[str, Any]:
        """Scores, and what is kept."""
        return {} if self.allocator is None else self.allocator.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them over as the fit starts."""
        self._state = state_dict


def _check(trainer: Trainer) -> None:
    """Raises, or warns, if something else of the run does not go with a budget."""
    if isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy):
        raise ValueError(
            "RankBudget scores whole deltas, and a sharded model has parts of them: take "
            "trainer.strategy ddp"
        )
    if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
        raise ValueError(
            "an average of the weights never loses a slice altogether: leave EMA (trainer/ema) or "
            "RankBudget out"
        )
    for callback in trainer.checkpoint_callbacks:
        own = isinstance(callback, ModelCheckpoint) and not isinstance(callback, BestCheckpoint)
        if own and callback.monitor is not None:
            rank_zero_warn(
                f"the best weights by {callback.monitor} may be of before the rank budget is met"
            )


def _scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """What gradients are a multiple of here: fused steps unscale those of 16-mixed themselves."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)  # torch's own mark
    return float(scaler.get_scale()) if scaler is not None and fused else 1.0


def _are_finite(optimizer: Optimizer) -> bool:
    """Whether the gradients are; a step of others is skipped, by a scaler or by NonFinite."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    gradients = [p.grad for p in parameters if p.grad is not None]
    return bool(torch.nn.utils.get_total_norm(gradients).isfinite())


def _pull(module: LightningModule, weight: float) -> None:
    """Adds the gradient of the orthogonality term to that of the loss.

    It is the same as if each batch's loss had the term, which depends on the weights alone, and it
    is computed once for all batches of a step. No task's loss has to know of it, and train/loss
    can be compared with that of other methods. After a step that was dropped there is no gradient
    to add to.
    """
    factors = [p for p in singular_factors(module) if p.grad is not None]
    if not factors:
        return
    with torch.enable_grad():
        gradients = torch.autograd.grad(orthogonality(module), factors)
    for parameter, gradient in zip(factors, gradients, strict=True):
        assert parameter.grad is not None
        parameter.grad.add_(gradient, alpha=weight)

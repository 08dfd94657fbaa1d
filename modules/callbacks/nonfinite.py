"""NonFinite: steps whose loss or gradients are no numbers are left out."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..adapters.replacing import replacing
from ._files import log_dir
from ._ranks import largest


class NonFinite(Callback):
    """Skips steps of a loss or of gradients that are not finite, and stops if they do not end.

    A skipped step changes neither weights nor moments; the schedule goes on. The number of them is
    logged as ``train/skipped_steps`` once there is one. The run stops after ``limit`` in a row, and
    each process leaves in ``<log folder>/nonfinite/step_N_rank_R.pt``, which ``torch.load`` opens,
    the batches of the last step whose loss was no number, or else the last one. Steps that the
    scaler of ``16-mixed`` skips for their gradients, to find its scale, are its own affair.
    """

    def __init__(self, limit: int = 10) -> None:
        """Sets the patience.

        Args:
            limit: Steps in a row that may be skipped before the run stops.
        """
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0
        self._batch: Any = None
        self._at_fault: list[Any] = []
        self._bad: Tensor | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch as long as it is trained on."""
        self._batch = batch

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Notes a loss that is no number, and does not wait for the device to know."""
        bad = ~loss.detach().isfinite()
        self._bad = bad if self._bad is None else self._bad | bad
        # Waiting for it after each batch of an accumulation is for the step that may be the last.
        if self.in_a_row == self.limit - 1 and bad:
            self._at_fault.append(_on_cpu(self._batch))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Takes the gradients away if one of them, or a loss, is no number on any process."""
        bad, self._bad = self._bad, None
        if bad is None:
            return
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if not scaled:
            bad = bad | ~_norm(optimizer).to(bad.device).isfinite()
        # All processes decide as one: a shard of the gradients, or one process's loss, is enough.
        if not largest(trainer, bad.float()):
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        _drop(optimizer, scaled)
        if self.in_a_row >= self.limit:
            self._stop(trainer)
        rank_zero_warn(
            f"step {trainer.global_step} was skipped: its loss or gradients are not finite "
            f"({self.in_a_row} in a row; the run stops at {self.limit})"
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs how many steps were skipped."""
        self._batch = None
        if self.skipped:
            pl_module.log("train/skipped_steps", float(self.skipped))

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Takes over the counts."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def _stop(self, trainer: Trainer) -> None:
        name = f"step_{trainer.global_step}_rank_{trainer.global_rank}.pt"
        path = log_dir(trainer) / "nonfinite" / name
        batches = self._at_fault or [_on_cpu(self._batch)]
        with replacing(path) as temporary:
            torch.save({"batches": batches, "epoch": trainer.current_epoch}, temporary)
        trainer.strategy.barrier("nonfinite")  # the first to fail ends those that still write
        raise FloatingPointError(
            f"loss or gradients were not finite in {self.in_a_row} steps in a row:\n"
            "train with a lower rate (--model.lr VALUE)\n"
            f"the batches to look at are in {path}"
        )


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    """This process's, as plain tensors."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    gradients = [p.grad.detach() for p in parameters if p.grad is not None]
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]


def _norm(optimizer: Optimizer) -> Tensor:
    """The norm of this process's gradients: one number to wait for.

    One that overflows is of gradients that no weights survive.
    """
    return torch.nn.utils.get_total_norm(_gradients(optimizer))


def _drop(optimizer: Optimizer, scaled: bool) -> None:
    """Makes the step that follows change nothing.

    Where the step unscales the gradients itself, as fused ones do, a scaler is yet to look at them,
    and insists on some. In the other cases it has looked.
    """
    if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):  # torch's own mark
        for gradient in _gradients(optimizer):
            gradient.fill_(torch.inf)
    else:
        optimizer.zero_grad(set_to_none=True)


def _on_cpu(batch: Any) -> Any:
    """Copies without the class that a box or a mask has, which no reader of weights alone knows."""
    return apply_to_collection(batch, Tensor, lambda t: t.detach().cpu().as_subclass(Tensor))

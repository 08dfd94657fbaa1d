"""What processes agree on."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor


def largest(trainer: Trainer, value: Tensor) -> float:
    """The largest of all processes' numbers; each process must ask.

    A strategy's own ``reduce`` waits at a barrier besides.
    """
    if trainer.world_size > 1:
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return value.item()

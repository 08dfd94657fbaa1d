"""What several processes do together: give one order to the samples they share, and agree."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics.utilities.distributed import gather_all_tensors

from .adapters.fingerprint import running_buffers

_NONE = object()
PATIENCE = 3.0  # seconds


def interleaved(parts: Iterable[Iterable[Any]]) -> Iterator[Any]:
    """What the processes have, as one alone would have it: sample i is with process i modulo n."""
    rows = zip_longest(*parts, fillvalue=_NONE)
    return (each for row in rows for each in row if each is not _NONE)


def gathered(rows: list[Any]) -> list[Any]:
    """The rows of all processes, interleaved; every process must call it."""
    if not dist.is_initialized():
        return rows
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return list(interleaved(parts))


def gather_in_order(values: Tensor, group: Any = None) -> list[Tensor]:
    """The ``dist_sync_fn`` of a metric that keeps a value of each sample.

    torchmetrics sets one process's values behind the other's: sums of floats would be rounded
    otherwise than those of one process.
    """
    parts = gather_all_tensors(values, group)
    places = torch.arange(sum(map(len, parts))).split([len(part) for part in parts])
    order = list(interleaved(places))
    if not order:  # there was no sample of the kind
        return [torch.cat(parts)]
    return [torch.cat(parts)[torch.stack(order).to(values.device)]]


def share_statistics(net: nn.Module) -> None:
    """Gives all processes the running statistics of the first: each has those of its batches."""
    if dist.is_initialized():
        for name in sorted(running_buffers(net)):
            dist.broadcast(net.get_buffer(name), 0)


@contextmanager
def ending_together(trainer: Trainer) -> Iterator[None]:
    """Ends the processes that the Trainer has started if this one fails.

    They would wait for it, and then complain of that. Most mistakes are those of all: the others
    leave it to the first to tell of one, and tell themselves if it does not end them.
    """
    try:
        yield
    except Exception:
        if not trainer.is_global_zero:
            time.sleep(PATIENCE)
        launcher = trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signal.SIGKILL)  # no other signal is heard by one that waits
        raise


def check_batch_norms(net: nn.Module, strategy: Strategy) -> None:
    """Raises if batch norms are to be of the batches of all processes, and cannot be.

    Args:
        net: The network.
        strategy: Lightning's, which will convert the batch norms of the network.
    """
    # No public attribute says that sync_batchnorm was asked for.
    if getattr(strategy, "_layer_sync", None) is None:
        return
    norms = {type(module) for module in net.modules() if isinstance(module, _BatchNorm)}
    if norms and strategy.root_device.type == "cpu":
        raise ValueError("trainer.sync_batchnorm works on GPUs only: leave it out on CPUs")
    if any(issubclass(norm, BatchNormAct2d) for norm in norms):  # torch would drop the activations
        raise ValueError(
            "trainer.sync_batchnorm knows no batch norms with an activation, as this network has: "
            "leave it out"
        )

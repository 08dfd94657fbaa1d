"""A network shared out among processes (FSDP2): each holds a part of every parameter."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from .backbones.blocks import blocks


def shard(net: nn.Module, mesh: DeviceMesh) -> Lockstep:
    """Shares out a network, in place: each block of its backbone by itself, and then the rest.

    A block is gathered for its own forward and backward, and let go. Stem, norms and head, with
    whatever is trained in them, stay gathered from forward to backward.

    Args:
        net: A network with `blocks`, on the CPU, a GPU or the meta device.
        mesh: The processes, in one dimension.

    Returns:
        What keeps the processes together in evaluations.

    Raises:
        ValueError: It has no blocks.
    """
    for block in blocks(net).values():
        fully_shard(block, mesh=mesh)
    return Lockstep(fully_shard(net, mesh=mesh))


def check_sharded(module: nn.Module) -> None:
    """Raises if a parameter trains and is not shared out: nothing would average its gradient.

    Args:
        module: A TuningModule, whose ``configure_model`` has shared its network out.

    Raises:
        ValueError: There is one, and the processes would drift apart without a word; or the module
            is another kind.
    """
    if not hasattr(module, "lockstep"):
        raise ValueError(
            f"litflora.strategies.FSDP2 shares out the networks of litflora's modules, and "
            f"{type(module).__name__} is none: derive it from litflora.TuningModule"
        )
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not hasattr(parameter, "full_tensor"):
            raise ValueError(
                f"{name} trains and is not sharded: each process would train its own. "
                "Make it a part of net in build()"
            )


class Lockstep:
    """Has all processes call a sharded network equally often in an evaluation.

    A call gathers weights, in which all processes have to take part, and they have different
    numbers of images and of windows in them. Before each call a process says that it makes one; one
    that has no more images joins in the calls of the others, and throws away what comes out.
    """

    def __init__(self, net: FSDPModule) -> None:
        """Watches the calls of a sharded network."""
        self.net = net
        self._last: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self._joining = False
        # Before FSDP's own.
        net.register_forward_pre_hook(self._before_call, prepend=True, with_kwargs=True)

    def _before_call(self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not net.training and not self._joining:
            self._last = args, kwargs
            self._calling(True)

    def finish(self) -> None:
        """Joins in the calls of others until nobody has any more; then lets go of the weights."""
        self._joining = True
        try:
            while self._calling(False):
                args, kwargs = self._last
                self.net(*args, **kwargs)
        finally:
            self._joining, self._last = False, ((), {})
        self.net.reshard()  # without a backward, FSDP holds what is not in blocks

    def _calling(self, mine: bool) -> bool:
        """Whether any process calls the network now."""
        # Not of the default type, which in half precision is another one inside of a step.
        device = next(self.net.parameters()).device
        count = torch.tensor(int(mine), dtype=torch.int32, device=device)
        dist.all_reduce(count)
        return bool(count > 0)

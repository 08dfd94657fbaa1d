"""Models whose parameters are shared out among processes, as FSDP does it.

Between its calls a sharded module holds parts of its parameters (DTensors under FSDP2), and for the
time of a call the whole ones. What reads all of a parameter is therefore called by all processes.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds no more than parts of the parameters."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def is_gathered_for_calls(layer: nn.Module) -> bool:
    """Whether a layer's whole weight is there during calls alone, so that nothing may be kept."""
    return getattr(layer, "_is_fsdp_managed_module", False)  # torch's own mark, for its compiler


def plain_name(name: str) -> str:
    """The name of a parameter without the wrappers that FSDP1 puts around modules."""
    return name.replace("_fsdp_wrapped_module.", "")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor on the CPU; of a sharded one only if every process asks for it."""
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach().cpu()


def rows_of(part: Any) -> tuple[int, int]:
    """The first row, and how many, that this process holds of a tensor shared out by rows."""
    size, mesh = part.shape[0], part.device_mesh
    each = -(-size // mesh.size())
    first = min(mesh.get_local_rank() * each, size)
    return first, min(each, size - first)


def part_of(value: Tensor, like: Any) -> Tensor:
    """What this process holds of a whole tensor that is shared out as ``like`` is, if it is."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor

    first, count = rows_of(like)
    own = value[first : first + count].to(like.device, copy=True)
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(own, mesh, placements, shape=like.shape, stride=like.stride())


def writes() -> bool:
    """Whether this process is the one of all that writes files."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0

"""Models whose parameters are shared out among processes, as FSDP does it.

Between its calls a sharded module holds parts of its parameters (DTensors under FSDP2), and for the
time of a call the whole ones. What reads all of a parameter is therefore called by all processes.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds no more than parts of the parameters."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def is_gathered_for_calls(layer: nn.Module) -> bool:
    """Whether a layer's whole weight is there during calls alone, so that nothing may be kept."""
    return getattr(layer, "_is_fsdp_managed_module", False)  # torch's own mark, for its compiler


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor on the CPU; of a sharded one only if every process asks for it."""
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach().cpu()


def writes() -> bool:
    """Whether this process is the one of all that writes files."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0

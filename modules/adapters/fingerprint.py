"""A fingerprint of the base: which weights an adapter was trained on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .base import base_weight
from .errors import AdapterError
from .layers import adapted_layers
from .quantized import original_fingerprint
from .sharded import whole, writes

# How far two projections may differ where one base is a rounded copy of the other.
ROUNDING = 1e-2
# Numbers that are projected at a time.
BLOCK = 1 << 20


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the base by name, as they are with nothing merged."""
    inside: set[str] = set()
    originals: dict[str, Tensor] = {}
    for name, layer, adapters in adapted_layers(model, every_name=True):
        prefix = f"{name}." if name else ""
        inside |= {f"{prefix}adapters.{key}" for key in adapters.state_dict()}
        originals |= {f"{prefix}{p}": base_weight(layer, p) for p in adapters.originals}
    state = model.state_dict()
    return {
        key: originals.get(key, tensor).detach()
        for key, tensor in state.items()
        if key not in inside and isinstance(tensor, Tensor)
    }


def fingerprint(tensors: dict[str, Tensor]) -> dict[str, str]:
    """A short digest of each tensor: its type, a projection, and a hash of shape and values.

    Of sharded tensors every process must ask for it; those that do not write get none.
    """
    digests = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if not hasattr(tensor, "full_tensor") or writes():
            digests[name] = _digest(full)
    return digests


def check(recorded: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Raises unless ``tensors`` are those that were recorded, or a copy of them in another type.

    Raises:
        AdapterError: A tensor is missing or has other values.
    """
    missing = [name for name in recorded if name not in tensors]
    if missing:
        raise AdapterError(
            f"the adapter was made for another base: it had {missing[0]}, this model has not. "
            "Load the model that the adapter was trained on"
        )
    for name, digest in recorded.items():
        here = _digest(whole(tensors[name]))
        if not _same(digest, here):
            raise AdapterError(
                f"the adapter was made for another base: the values of {name} differ "
                f"(adapter {digest}, model {here}). Load the weights it was trained on"
            )


def _digest(tensor: Tensor) -> str:
    original = original_fingerprint(tensor)
    if original is not None:
        return original
    values = tensor.detach().cpu().contiguous()
    content = hashlib.sha256(repr(tuple(values.shape)).encode())
    content.update(values.reshape(-1).view(torch.uint8).numpy().data)
    kind = str(values.dtype).removeprefix("torch.")
    return f"{kind} {_projection(values):.4f} {content.hexdigest()[:8]}"


def _projection(values: Tensor) -> float:
    """The component of the values along one fixed direction, which rounding hardly moves.

    It is scaled such that unrelated values of any size lie about a standard deviation of 1 apart.
    """
    component = square = 0.0
    for start in range(0, values.numel(), BLOCK):  # the whole in float64 could be a base's size
        block = values.reshape(-1)[start : start + BLOCK].double()
        places = torch.arange(start + 1, start + 1 + len(block), dtype=torch.float64)
        component += float(block @ places.cos_())
        square += float(block @ block)
    return component / math.sqrt(square) * math.sqrt(2) if square else 0.0


def _same(recorded: str, here: str) -> bool:
    dtype, projection, content = recorded.split(" ")
    other_dtype, other_projection, other_content = here.split(" ")
    if dtype == other_dtype:
        return content == other_content
    # A base cast to another type has other bytes: there the projection must tell.
    return abs(float(projection) - float(other_projection)) <= ROUNDING


def running_buffers(model: nn.Module) -> set[str]:
    """Names of the statistics that batch norms gather in training, trained or not."""
    return {
        f"{name}.{buffer}".lstrip(".")
        for name, module in model.named_modules()
        if getattr(module, "track_running_stats", False)
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
        if getattr(module, buffer, None) is not None
    }


def first_difference(expected: Iterable[str], found: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names missing from ``found``, and names in it that were not expected."""
    want, have = set(expected), set(found)
    return sorted(want - have), sorted(have - want)

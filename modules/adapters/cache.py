"""Unmerged inference at the price of the base: W + dW, kept while nothing it is made of changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .total import Total

# Steps of any optimizer: fused ones write to parameters without moving their version counters.
_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


@dataclass(frozen=True)
class _Kept:
    parts: tuple[Tensor, ...]
    storages: tuple[torch.UntypedStorage, ...]  # held, so that no other takes their address
    state: tuple[object, ...]
    value: Tensor


class WeightCache:
    """W + dW of one layer, by parameter.

    A weight is made again when a factor, the base weight, a scale or the choice of adapters has
    changed, or an optimizer has stepped. Changes are seen by torch's version counters, which a
    write through ``tensor.data`` does not move: ``train()`` forgets what is kept.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def clear(self) -> None:
        """Forgets every weight."""
        self._kept.clear()

    def get(self, param: str, weight: Tensor, total: Total, dtype: torch.dtype) -> Tensor:
        """Returns ``W + dW`` in ``dtype``, for a forward without gradients."""
        parts = (weight, *total.tensors())
        if _is_traced() or not all(map(_has_version, parts)):
            return added(weight, total, dtype)
        scales = [
            (share, leaf and leaf.scale) for d, share in total.terms for _, leaf in d.leaves()
        ]
        state = (dtype, _steps, *scales, *((part._version, part.data_ptr()) for part in parts))
        kept = self._kept.get(param)
        if kept is None or kept.state != state or any(map(_differ, kept.parts, parts)):
            self._kept.pop(param, None)  # before the new one, so that there are never two
            if any(map(_is_unwatched, parts)):
                return added(weight, total, dtype)
            storages = tuple(part.untyped_storage() for part in parts)
            kept = _Kept(parts, storages, state, added(weight, total, dtype))
            self._kept[param] = kept
        return kept.value


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _has_version(part: Tensor) -> bool:
    return type(part) in (Tensor, nn.Parameter) and not part.is_inference()


def _is_unwatched(part: Tensor) -> bool:
    """Whether a tensor can change unseen: another process may write to shared memory."""
    return part.is_meta or (part.device.type == "cpu" and part.is_shared())


def added(weight: Tensor, total: Total, dtype: torch.dtype) -> Tensor:
    """W + dW, summed in the precision of the wider one."""
    return (weight + total(*total.tensors())).to(dtype)


def _differ(one: Tensor, other: Tensor) -> bool:
    return one is not other

"""Layers whose own forward runs with ``W + dW`` put in the place of W.

Attention, layers with a forward of their own and raw parameters are computed so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .total import Total

# Owner, name and delta of each weight that a forward reads.
Sums = dict[str, tuple[Any, str, Total]]

# Two threads that put weights in the same place would each restore what the other had put there.
_LOCK = threading.RLock()


@contextmanager
def substituted(sums: Sums) -> Iterator[None]:
    """Puts ``W + dW`` in the place of each weight for one forward."""
    if torch.compiler.is_compiling():  # which cannot trace a lock
        with _swapped(sums):
            yield
    else:
        with _LOCK, _swapped(sums):
            yield


@dataclass(frozen=True)
class _Sum:
    """W + dW of one forward, which backward makes from the very tensors that forward had."""

    weight: Tensor
    total: Total
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, weight: Tensor, total: Total) -> _Sum:
        tensors = total.tensors()
        traced = torch.compiler.is_compiling()  # which keeps what it likes, and knows no versions
        versions = () if traced else _versions(weight, *tensors)
        return cls(weight, total, tensors, versions, total.scales())

    def make(self) -> Tensor:
        return (self.weight + self.total(*self.tensors)).to(self.weight.dtype)

    def make_again(self) -> Tensor:
        self.total.check(self.scales)
        if _versions(self.weight, *self.tensors) != self.versions:
            raise RuntimeError(
                "a weight or a factor was modified by an inplace operation between forward and "
                "backward: step, merge or unmerge after backward"
            )
        return self.make()


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


@contextmanager
def _swapped(sums: Sums) -> Iterator[None]:
    kept = [(module, param, module._parameters[param]) for module, param, _ in sums.values()]
    swapped: list[tuple[Tensor, _Sum]] = []
    for module, param, total in sums.values():
        weight = module._parameters[param]
        assert weight is not None
        made = _Sum.of(weight, total)
        if torch.is_grad_enabled() or module.training:
            added = made.make()
        else:
            added = module.adapters.cache.get(param, weight, total, weight.dtype)
        swapped.append((added, made))
    try:
        for (module, param, _), (added, _) in zip(kept, swapped, strict=True):
            module._parameters[param] = added
        with _rebuilt_in_backward(swapped):
            yield
    finally:
        for module, param, weight in kept:
            module._parameters[param] = weight


@dataclass(frozen=True)
class _Outer:
    """What the hooks around ours made of a tensor."""

    packed: Any


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _outer_hooks() -> tuple[Callable[..., Any], Callable[..., Tensor]] | None:
    """The saved-tensor hooks that are active now; torch has no public way to ask."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return tuple(hooks) if hooks else None  # type: ignore[return-value]


def _rebuilt_in_backward(
    swapped: list[tuple[Tensor, _Sum]],
) -> AbstractContextManager[Any]:
    """Keeps autograd from saving any ``W + dW``: it saves how to build it again."""
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or not torch.is_grad_enabled():
        return nullcontext()
    known = {added.untyped_storage().data_ptr(): made for added, made in swapped}

    # Hooks do not nest: whatever is not ours goes on to those around us, such as checkpointing's.
    outer_pack, outer_unpack = _outer_hooks() or (Tensor.detach, _as_it_is)

    def pack(tensor: Tensor) -> Any:
        source = known.get(tensor.untyped_storage().data_ptr())
        if source is None:
            return _Outer(outer_pack(tensor))
        return source, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, _Outer):
            return outer_unpack(packed.packed)
        source, size, stride, offset = packed
        return torch.as_strided(source.make_again(), size, stride, offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

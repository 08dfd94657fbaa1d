"""The sum of the deltas that act on one weight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .delta import Delta
from .functions import without_autocast


class Total:
    """The weighted sum of the deltas that are active on one weight."""

    def __init__(self, terms: Sequence[tuple[Delta, float]]) -> None:
        self.terms = list(terms)

    def tensors(self) -> tuple[Tensor, ...]:
        """The factors of every term, in the order that calling takes them."""
        return tuple(tensor for delta, _ in self.terms for tensor in delta.tensors())

    def scales(self) -> tuple[float, ...]:
        """What the sum depends on besides its tensors."""
        leaves = (leaf for delta, _ in self.terms for _, leaf in delta.leaves())
        return tuple(leaf.scale for leaf in leaves if leaf is not None)

    def check(self, scales: tuple[float, ...]) -> None:
        """Raises if a scale is not what it was in forward."""
        if self.scales() != scales:
            raise RuntimeError("the scale of a delta was changed between forward and backward")

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The summed dW, made from ``tensors``, in the factors' own precision."""
        total: Tensor | None = None
        start = 0
        with without_autocast(tensors[0].device.type):
            for delta, weight in self.terms:
                stop = start + len(delta.tensors())
                dense = delta.compose(*tensors[start:stop])
                dense = dense if weight == 1.0 else weight * dense
                total = dense if total is None else total + dense
                start = stop
        assert total is not None
        return total

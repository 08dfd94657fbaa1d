"""The weight that a delta changes, for deltas whose form or start depends on it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn


def base_weight(layer: nn.Module, param: str) -> Tensor:
    """The weight that a layer had before anything was merged."""
    adapters = getattr(layer, "adapters", None)
    originals: dict[str, Tensor] = getattr(adapters, "originals", {})
    if param in originals and adapters is not None and adapters.enabled:
        return originals[param]
    weight = getattr(layer, param)
    assert isinstance(weight, Tensor)
    return weight


@dataclass(frozen=True)
class Base:
    """Where a delta finds its weight; a delta holds it without owning the layer.

    Attributes:
        layer: The layer.
        param: The name of the weight in it.
        dim: The mode that a part of a fused weight is a slice of.
        start: The first row of the slice.
        rows: Its length; None is the whole weight.
    """

    layer: nn.Module
    param: str
    dim: int = 0
    start: int = 0
    rows: int | None = None

    def whole(self) -> Tensor:
        """The whole stored weight as it is now, without any delta."""
        return base_weight(self.layer, self.param)

    def own(self, whole: Tensor) -> Tensor:
        """What a delta changes of the whole weight."""
        return whole if self.rows is None else whole.narrow(self.dim, self.start, self.rows)

    def part(self, dim: int, start: int, rows: int) -> Base:
        """A slice of the weight."""
        return replace(self, dim=dim, start=start, rows=rows)

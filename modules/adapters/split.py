"""Deltas of parts of a fused weight, such as q and v of a qkv."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .base import Base
from .delta import Delta, WeightInfo
from .errors import AdapterError
from .tuning import Parts


class SplitDelta(Delta):
    """One delta for each adapted slice of the output mode; the other slices stay as they are.

    Attributes:
        parts: ``{str(index of the part): delta}``.
        sizes: Rows of each part, adapted or not.
    """

    def __init__(self, info: WeightInfo, sizes: list[int], parts: dict[str, Delta]) -> None:
        first = next(iter(parts.values()))
        super().__init__(info, 1.0, first.path, first.dropout)
        self.sizes = sizes
        self.parts = nn.ModuleDict(parts)
        self.clamped = any(part.clamped for part in parts.values())

    def leaves(self) -> list[tuple[int, Delta | None]]:
        """Rows and delta of each part; None where a part is not adapted."""
        by_index = dict(self.parts.items())
        return [(size, by_index.get(str(i))) for i, size in enumerate(self.sizes)]  # type: ignore[misc]

    def _deltas(self) -> list[Delta]:
        return [delta for _, delta in self.leaves() if delta is not None]

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of every part, one after the other."""
        return tuple(tensor for delta in self._deltas() for tensor in delta.tensors())

    def compose(self, *factors: Tensor) -> Tensor:
        """Lays the parts one below the other, with zeros where nothing is adapted."""
        slices, start = [], 0
        for size, delta in self.leaves():
            if delta is None:
                shape = list(self.info.shape)
                shape[self.info.out_dim] = size
                slices.append(factors[0].new_zeros(shape))
            else:
                stop = start + len(delta.tensors())
                slices.append(delta.compose(*factors[start:stop]))
                start = stop
        return torch.cat(slices, self.info.out_dim)

    def bind(self, base: Base) -> None:
        """Tells each part which rows of the weight are its own."""
        super().bind(base)
        first = 0
        for size, delta in self.leaves():
            if delta is not None:
                delta.bind(base.part(self.info.out_dim, first, size))
            first += size

    def start(self) -> None:
        """Starts every part."""
        for delta in self._deltas():
            delta.start()

    def reset_parameters(self) -> None:
        """Resets every part."""
        for delta in self._deltas():
            delta.reset_parameters()

    def ranks(self) -> tuple[int, ...]:
        """The ranks of the first part."""
        return self._deltas()[0].ranks()

    def settings(self) -> dict[str, Any]:
        """The sizes and the settings of each part."""
        parts = {
            str(i): {"type": type(delta).__name__, **delta.settings()}
            for i, (_, delta) in enumerate(self.leaves())
            if delta is not None
        }
        return {"sizes": self.sizes, "parts": parts}


def split(info: WeightInfo, parts: Parts, build: Callable[[WeightInfo], Delta]) -> SplitDelta:
    """Makes the deltas of the parts of one weight."""
    sizes = _sizes(info, parts)
    return SplitDelta(info, sizes, {str(i): build(part_info(info, sizes, i)) for i in parts.adapt})


def part_info(info: WeightInfo, sizes: list[int], index: int) -> WeightInfo:
    """The weight of one part as its own delta sees it."""
    shape = list(info.shape)
    shape[info.out_dim] = sizes[index]
    return replace(info, shape=tuple(shape), name=f"{info.name}[{index}]")


def _sizes(info: WeightInfo, parts: Parts) -> list[int]:
    rows = info.shape[info.out_dim]
    if isinstance(parts.of, int):
        if parts.of < 1 or rows % parts.of:
            raise AdapterError(
                f"{info.name} has {rows} rows: they do not split into {parts.of} equal parts"
            )
        sizes = [rows // parts.of] * parts.of
    else:
        sizes = list(parts.of)
    if sum(sizes) != rows or min(sizes) < 1:
        raise AdapterError(
            f"{info.name} has {rows} rows, but its parts {sizes} make {sum(sizes)}: give the rows "
            "of each part, all above 0"
        )
    if info.groups > 1:
        raise AdapterError(
            f"{info.name} is a grouped convolution: its parts are its groups already"
        )
    known = set(range(len(sizes)))
    if (
        not parts.adapt
        or not known.issuperset(parts.adapt)
        or len({*parts.adapt}) < len(parts.adapt)
    ):
        raise AdapterError(
            f"{info.name} has parts 0 to {len(sizes) - 1}: cannot adapt {parts.adapt}"
        )
    return sizes

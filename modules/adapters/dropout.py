"""Dropout on the input of the chain, drawn again in backward: no mask is kept.

Rows of a linear layer are dropped some at a time, so that what is made for it stays in the cache of
a CPU; a mask of the whole input would cost several times as much in memory traffic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .maps import LinearMap, Map, is_watched, plus, times

# Rows whose mask is drawn at once; a multiple of 4, which is how many elements share a number, so
# that blocks of rows are given the numbers that the whole would be given.
ROWS = 256


@dataclass(frozen=True)
class Dropout:
    """One draw of a mask.

    Attributes:
        p: Probability of dropping an input.
        seed: Seed of the mask.
    """

    p: float
    seed: int

    def amplified(self, thin: Tensor) -> Tensor:
        """A thin tensor times 1 / (1 - p), which makes up for the inputs that are dropped."""
        return thin / (1 - self._dropped / 2**16)

    def hidden(self, maps: Map, x: Tensor, narrow: Tensor) -> Tensor:
        """``(x * mask) A^T``, for an input of the map."""
        if not _in_blocks(maps, x):
            return maps.hidden(times(self._mask(x), x), narrow)
        rows = x.reshape(-1, x.shape[-1])
        blocks = self._masks(rows)
        hidden = [maps.hidden(times(mask, rows[block]), narrow) for block, mask in blocks]
        return torch.cat(hidden).view(*x.shape[:-1], len(narrow))

    def chain_grads(
        self, maps: Map, gx: Tensor | None, g_hidden: Tensor, narrow: Tensor, x: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """What backward of the chain needs.

        Args:
            maps: The layer's map.
            gx: Gradient of the input without the chain's part, which may be written into; None
                if it is not wanted.
            g_hidden: Gradient of what `hidden` gave.
            narrow: A.
            x: The input of the map.

        Returns:
            The gradient of the input, what `hidden` gave, and the gradient of A.
        """
        if not _in_blocks(maps, x):
            mask = self._mask(x)
            if gx is not None:
                gx = plus(gx, times(maps.input_grad(g_hidden, narrow, x), mask))
            dropped = x * mask
            g_narrow = maps.narrow_grad(g_hidden, dropped, narrow.shape)
            return gx, maps.hidden(dropped, narrow), g_narrow
        rows, g_rows = x.reshape(-1, x.shape[-1]), g_hidden.reshape(-1, len(narrow))
        wide = torch.promote_types(narrow.dtype, torch.float32)  # sums of many blocks would round
        hidden, g_narrow = [], torch.zeros_like(narrow, dtype=wide)
        for block, mask in self._masks(rows):
            if gx is not None:
                gx.view(rows.shape)[block] += (g_rows[block] @ narrow).mul_(mask)
            dropped = mask.mul_(rows[block])
            hidden.append(maps.hidden(dropped, narrow))
            g_narrow += maps.narrow_grad(g_rows[block], dropped, narrow.shape)
        return gx, torch.cat(hidden), g_narrow

    def _masks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The mask of some rows after the other; together they are that of the whole."""
        generator = self._generator(rows)
        for start in range(0, len(rows), ROWS):
            block = slice(start, start + ROWS)
            yield block, self._kept(rows[block], generator)

    def _mask(self, x: Tensor) -> Tensor:
        return self._kept(x, self._generator(x))

    def _generator(self, x: Tensor) -> torch.Generator:
        return torch.Generator(x.device).manual_seed(self.seed)

    def _kept(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Ones and zeros of the size and type of ``x``."""
        # Sixteen random bits for each element: drawing a float for each takes ten times as long.
        words = torch.empty(max(1, -(-x.numel() // 4)), dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None, generator=generator)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        kept = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return torch.ge(bits, self._dropped - 2**15, out=kept)  # no mask of bools in between

    @property
    def _dropped(self) -> int:
        """How many of 65,536 inputs are dropped."""
        return min(round(self.p * 2**16), 2**16 - 1)


def _in_blocks(maps: Map, x: Tensor) -> bool:
    """Whether rows are dropped some at a time."""
    linear = isinstance(maps, LinearMap) and x.numel() > 0
    return linear and x.device.type == "cpu" and not is_watched()

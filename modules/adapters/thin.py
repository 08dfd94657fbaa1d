"""The thin form of a delta: ``dW = B A`` with few rows in A, whatever the method."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta import Delta
from .maps import is_channels_last, plus
from .tucker import expand


def thin(terms: list[tuple[Delta, float]]) -> tuple[Tensor, Tensor]:
    """The weighted sum of deltas that have a Tucker form, as one product.

    Args:
        terms: Deltas of one weight, and their weights.

    Returns:
        B of shape ``[out, R]`` and A of the stored shape, with R in the place of its output mode.
    """
    out_dim = terms[0][0].info.out_dim
    pairs = [pair for delta, weight in terms for pair in _pairs(delta, weight)]
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs], out_dim)


def added(weight: Tensor, widen: Tensor, narrow: Tensor, out_dim: int, x: Tensor) -> Tensor:
    """``W + B A`` in the wider type of the two, laid out in memory as the layer wants it.

    Args:
        weight: W.
        widen: B, ``[out, R]``.
        narrow: A, of the shape of W with R in the place of its output mode.
        out_dim: The output mode of W.
        x: The input that W is for.
    """
    wide = torch.promote_types(weight.dtype, widen.dtype)
    widen, narrow = widen.to(wide), narrow.to(wide)
    if out_dim != 0:
        dense = torch.tensordot(widen, narrow, dims=([1], [out_dim]))
        return weight + dense.movedim(0, out_dim)
    if narrow.dim() == 4 and is_channels_last(x):
        # torch's convolution would otherwise lay W + dW out as the input is, in another pass.
        last = weight.movedim(1, -1)
        dense = (widen @ narrow.movedim(1, -1).flatten(1)).view(last.shape)
        return plus(dense, last).movedim(-1, 1)
    dense = (widen @ narrow.flatten(1)).view(weight.shape)
    return plus(dense, weight) if weight.is_contiguous() else weight + dense


def _pairs(delta: Delta, weight: float) -> list[tuple[Tensor, Tensor]]:
    """The pair of each leaf; B has zeros in the rows of the others."""
    rows, start, pairs = delta.info.shape[delta.info.out_dim], 0, []
    for size, leaf in delta.leaves():
        if leaf is not None:
            widen, narrow = _pair(leaf, weight * leaf.scale)
            if size != rows:
                widen = F.pad(widen, (0, 0, start, rows - start - size))
            pairs.append((widen, narrow))
        start += size
    return pairs


def _pair(leaf: Delta, scale: float) -> tuple[Tensor, Tensor]:
    form = leaf.tucker()
    assert form is not None
    core, factors = form
    out = leaf.info.out_dim
    widen, rest = factors[out], [None if n == out else f for n, f in enumerate(factors)]
    if widen is None:
        widen = torch.eye(core.shape[out], dtype=core.dtype, device=core.device)
    # Laid out in order, or a convolution with A would lay out its input anew.
    return widen if scale == 1.0 else widen * scale, expand(core, rest).contiguous()

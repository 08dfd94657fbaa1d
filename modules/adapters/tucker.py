"""The Tucker form that every delta shares.

A tensor is written as ``core x_1 F_1 x_2 F_2 ... x_N F_N`` (FLoRA, arXiv 2405.14739, section 3):
each factor ``F_n`` of shape ``[I_n, J_n]`` widens mode ``n`` of the core from ``J_n`` to ``I_n``.
A factor of ``None`` is the identity: that mode of the core has its full size already.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

Factors = Sequence[Tensor | None]


def expand(core: Tensor, factors: Factors) -> Tensor:
    """Multiplies the core by its factors.

    Args:
        core: Tensor of shape ``[J_1, ..., J_N]``, of two modes or more.
        factors: One ``[I_n, J_n]`` matrix or ``None`` for each mode.

    Returns:
        The dense tensor, of shape ``[I_1, ..., I_N]``.
    """
    sizes = [n if f is None else len(f) for n, f in zip(core.shape, factors, strict=True)]
    first, second, *inner = factors
    # Backward keeps what is made on the way, which is small if the modes that grow go last: the
    # kernel's before the second, and then the first, as its product is the quickest.
    if first is not None and second is not None and _growth(first) < min(2, _growth(second)):
        core, first = first.mm(core.flatten(1)).view(len(first), *core.shape[1:]), None
    rows, columns, *ranks = core.shape
    if ranks and second is not None and _growth(second) == 1:  # the three channels of an image
        core, second = _widened(core.reshape(rows, -1), [columns, *ranks], [second, *inner]), None
    elif any(factor is not None for factor in inner):
        core = _widened(core.reshape(rows * columns, -1), ranks, inner)
    if second is not None:
        core = second @ core.reshape(rows, columns, -1) if ranks else core.mm(second.t())
    core = core.reshape(rows, -1)
    core = core if first is None else first.mm(core)
    return core.view(sizes)


def _growth(factor: Tensor) -> float:
    return factor.shape[0] / max(1, factor.shape[1])


def _widened(core: Tensor, ranks: Sequence[int], factors: Factors) -> Tensor:
    """Widens the columns of ``core``, which are modes of these ranks; leaves the rows.

    Each product takes the mode that comes first and puts it last: the tensor can be seen as a
    matrix every time, and is not laid out anew in between.
    """
    rest = core.t()
    for rank, factor in zip(ranks, factors, strict=True):
        rest = rest.reshape(rank, -1).t()
        rest = rest if factor is None else rest.mm(factor.t())
    return rest


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiplies one mode of ``tensor``, of size J, by a ``[I, J]`` matrix."""
    return F.linear(tensor.movedim(mode, -1), matrix).movedim(-1, mode)

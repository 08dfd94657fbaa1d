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
        core: Tensor of shape ``[J_1, ..., J_N]``.
        factors: One ``[I_n, J_n]`` matrix or ``None`` for each mode.

    Returns:
        The dense tensor, of shape ``[I_1, ..., I_N]``.
    """
    # The mode that grows least goes first, so that the intermediates stay small.
    modes = [n for n, factor in enumerate(factors) if factor is not None]
    modes.sort(key=lambda n: factors[n].shape[0] / max(1, factors[n].shape[1]))  # type: ignore[union-attr]
    for n in modes:
        core = mode_product(core, factors[n], n)  # type: ignore[arg-type]
    return core


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiplies one mode of ``tensor``, of size J, by a ``[I, J]`` matrix."""
    if mode == 0:  # laid out in order, as the weight is that it will be added to
        return (matrix @ tensor.flatten(1)).view(-1, *tensor.shape[1:])
    return F.linear(tensor.movedim(mode, -1), matrix).movedim(-1, mode)

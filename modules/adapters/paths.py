"""The rule that says how a layer with deltas is computed.

side      the layer's own operation, and beside it the low-rank chain of dW
rebuilt   one operation with ``W + dW``, built again in backward; the chain gives the gradients
merged    the same, but the factors' gradients come from that of the whole weight
kept      one operation with ``W + dW``, which is kept until something changes (see `cache`)

All are exact; they differ in time and memory alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .delta import Delta, WeightInfo
from .errors import AdapterError
from .functions import without_autocast

# Below this ratio of the layer's own work to the side chain's, the chain costs more than the
# whole weight gradient that it avoids: its rank-r products are bound by memory traffic.
NARROW = 3.0


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


def choose(total: Total, rows: int, weight: Tensor, training: bool, grad: bool = True) -> str:
    """Which path a layer takes: its deltas' own choice, or for "auto" the first line that holds.

    ============================================  =======  ====================================
    a delta has no low-rank chain                 merged   nothing else is possible
    dropout, in training                          side     it acts on the chain's input
    the weight is stored in half precision        side     bf16(W + dW) loses most of a small dW
    embedding                                     side     a look-up in the factor is all it takes
    neither training nor gradients                kept     it then costs what the base costs
    depthwise                                     merged   the chain has r times the base's work
    the weight itself trains                      merged   its gradient is formed anyway
    few channels, and rows to pay for building W  merged   see `NARROW`
    rows to pay for building W                    rebuilt  the chain runs in backward alone
    everything else                               side
    ============================================  =======  ====================================

    Args:
        total: The deltas that act on the weight.
        rows: Positions that the layer maps: tokens, or pixels of a convolution.
        weight: The base weight.
        training: Whether the layer is in training mode.
        grad: Whether gradients are recorded.
    """
    idle = not training and not grad
    leaves = [leaf for delta, _ in total.terms for _, leaf in delta.leaves() if leaf is not None]
    info = leaves[0].info
    dropped = training and any(leaf.dropout > 0 for leaf in leaves)
    asked = {leaf.path for leaf in leaves} - {"auto"}
    forms = [leaf.tucker() for leaf in leaves]
    chainless = not info.has_side or None in forms
    if dropped and (chainless or asked & {"rebuilt", "merged"}):
        raise AdapterError(
            f"{info.name}: the dropout of one active adapter needs the side path, which another "
            "active one does not take: activate one of them, or leave dropout off"
        )
    if chainless:
        return "kept" if idle else "merged"
    if "side" in asked:
        return "side"
    if asked and not idle:
        whole = "merged" in asked or info.groups > 1 or info.kind == "embedding"
        return "merged" if whole else "rebuilt"  # which groups and look-ups do not have
    if dropped or weight.dtype in (torch.float16, torch.bfloat16) or info.kind == "embedding":
        return "side"
    if idle:
        return "kept"
    if info.kind == "depthwise" or weight.requires_grad:
        return "merged"
    rank = sum(form[0].shape[info.out_dim] for form in forms if form is not None)
    return _by_size(info, rank, rows, weight)


def _by_size(info: WeightInfo, rank: int, rows: int, weight: Tensor) -> str:
    fan_out = weight.shape[info.out_dim]
    fan_in = weight.numel() // fan_out
    own, chain = fan_in * fan_out, rank * (fan_in + fan_out)
    pays = rows * (fan_in + fan_out) >= own
    if pays and own <= NARROW * 2 * chain:
        return "merged"
    return "rebuilt" if pays and info.groups == 1 else "side"

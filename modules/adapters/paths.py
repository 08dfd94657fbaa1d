"""The rule that says how a layer with deltas is computed.

side      the layer's own operation, and beside it the low-rank chain of dW
rebuilt   one operation with ``W + dW``, built again in backward; the chain gives the gradients
merged    the same, but the factors' gradients come from that of the whole weight
kept      one operation with ``W + dW``, which is kept until something changes (see `cache`)

All are exact; they differ in time and memory alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .delta import Delta, WeightInfo
from .errors import AdapterError
from .measured import nearest, timed_paths
from .quantized import is_quantized
from .total import Total

# Below this ratio of the layer's own work to the side chain's, the chain costs more than the
# whole weight gradient that it avoids: its rank-r products are bound by memory traffic.
NARROW = 3.0


@dataclass
class Choice:
    """What the choice of a path depends on.

    Attributes:
        total: The deltas that act on the weight.
        rows: Positions that the layer maps: tokens, or pixels of a convolution.
        weight: The base weight.
        training: Whether the layer is in training mode.
        grad: Whether gradients are recorded.
        dtype: What the layer computes in.
        stride: The stride of a convolution; empty for others.
        leaves: The deltas, those of a fused weight's parts each by itself.
        info: The weight, as its deltas know it.
    """

    total: Total
    rows: int
    weight: Tensor
    training: bool
    grad: bool
    dtype: torch.dtype
    stride: tuple[int, ...] = ()

    leaves: list[Delta] = field(init=False)
    info: WeightInfo = field(init=False)

    def __post_init__(self) -> None:
        pairs = (pair for delta, _ in self.total.terms for pair in delta.leaves())
        self.leaves = [leaf for _, leaf in pairs if leaf is not None]
        self.info = self.leaves[0].info

    def rank(self) -> int | None:
        """Rows of A in dW = B A; None if some delta has no such form."""
        forms = [leaf.tucker() for leaf in self.leaves]
        ranks = [form[0].shape[self.info.out_dim] for form in forms if form is not None]
        return sum(ranks) if len(ranks) == len(forms) else None

    def key(self) -> str:
        """The name under which this weight's paths are timed."""
        parts = [self.info.kind, "x".join(map(str, self.weight.shape))]
        if self.info.kind == "conv" and self.info.out_dim != 0:
            parts.append("transposed")
        if self.info.groups > 1:
            parts.append(f"groups {self.info.groups}")
        if any(step > 1 for step in self.stride):
            parts.append(f"stride {'x'.join(map(str, self.stride))}")
        return f"{' '.join(parts)} rank {self.rank()} {str(self.dtype).removeprefix('torch.')}"


def choose(choice: Choice) -> str:
    """Which path a layer takes: its deltas' own choice, or for "auto" the first line that holds.

    ============================================  =======  ====================================
    a delta has no low-rank chain                 merged   nothing else is possible
    dropout, in training                          side     it acts on the chain's input
    the weight is stored in half precision        side     bf16(W + dW) loses most of a small dW
    the weight is quantised                       side     W + dW has no such form
    embedding                                     side     a look-up in the factor is all it takes
    neither training nor gradients                kept     it then costs what the base costs
    the weight itself trains                      merged   its gradient is formed anyway
    timed on this machine                         (any)    see `measured`
    depthwise                                     merged   the chain has r times the base's work
    few channels, and rows to pay for building W  merged   see `NARROW`
    rows to pay for building W                    rebuilt  the chain runs in backward alone
    everything else                               side
    ============================================  =======  ====================================
    """
    path = forced(choice) or timed(choice) or by_size(choice)
    return possible(path, choice.info)


def timed(choice: Choice) -> str | None:
    """The path that was timed as the fastest for a layer that has a choice, if one was."""
    known = timed_paths(choice.weight.device)
    return nearest(known.get(choice.key(), {}), choice.rows) if known else None


def forced(choice: Choice) -> str | None:
    """The path of a layer that has no choice: by what was asked for, or for exactness."""
    info, idle = choice.info, not choice.training and not choice.grad
    asked = {leaf.path for leaf in choice.leaves} - {"auto"}
    half = choice.weight.dtype in (torch.float16, torch.bfloat16) or is_quantized(choice.weight)
    look_up = info.kind == "embedding"
    if idle and not ("side" in asked or half or look_up):  # soon told, for inference is short
        return "kept"
    dropped = choice.training and any(leaf.dropout > 0 for leaf in choice.leaves)
    chainless = not info.has_side or choice.rank() is None
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
        return "merged" if "merged" in asked else "rebuilt"
    if dropped or half or look_up:
        return "side"
    return "merged" if choice.weight.requires_grad else None


def possible(path: str, info: WeightInfo) -> str:
    """The path itself, or the next one to it that the weight has."""
    not_rebuilt = info.groups > 1 or info.kind == "embedding"
    return "merged" if path == "rebuilt" and not_rebuilt else path


def by_size(choice: Choice) -> str:
    """The path of a layer that has a choice, from the sizes of its weight and its input."""
    info = choice.info
    if info.kind == "depthwise":
        return "merged"
    rank = choice.rank()
    assert rank is not None
    fan_out = choice.weight.shape[info.out_dim]
    fan_in = choice.weight.numel() // fan_out
    own, chain = fan_in * fan_out, rank * (fan_in + fan_out)
    pays = choice.rows * (fan_in + fan_out) >= own
    if pays and own <= NARROW * 2 * chain:
        return "merged"
    return "rebuilt" if pays and info.groups == 1 else "side"

"""What a rank holds and sends in a step, by formulas, for DDP and FSDP2.

F are the bytes of the frozen weights, T those of the trained ones, R those of what lies outside the
blocks: FSDP2 gathers them once, and the blocks once for forward and once for backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from litflora.backbones.blocks import blocks

STRATEGIES = ("DDP", "FSDP2")
# Shares of a payload that leave each of n ranks, as shares of (n - 1) / n: in a ring, and in gloo,
# which reduces everything on every rank where a shard is asked for.
RING = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
GLOO = {**RING, "reduce-scatter": 2}


@dataclass(frozen=True)
class Sizes:
    """Bytes of a network's weights; for shards, with the rows that fill each tensor up.

    Attributes:
        frozen: What does not train, F.
        trained: What does, T.
        root: What lies outside the blocks, trained or not, R.
    """

    frozen: int
    trained: int
    root: int

    @classmethod
    def of(cls, net: nn.Module, ranks: int = 1) -> Sizes:
        """The sizes of a network, before it is spread.

        Args:
            net: The network; on the meta device, too.
            ranks: How many ranks share each tensor, by its rows.
        """
        sizes = {False: 0, True: 0}
        inside = {p for block in blocks(net).values() for p in block.parameters()}
        for parameter in net.parameters():
            sizes[parameter.requires_grad] += padded(parameter, ranks)
        root = sum(padded(p, ranks) for p in net.parameters() if p not in inside)
        return cls(sizes[False], sizes[True], root)


def padded(parameter: Tensor, ranks: int) -> int:
    """Bytes of a tensor that is filled up until all ranks have as many rows of it."""
    rows = parameter.shape[0]
    return parameter.nbytes // rows * math.ceil(rows / ranks) * ranks


def held(sizes: Sizes, strategy: str, ranks: int) -> dict[str, int]:
    """Bytes that a rank has of weights, gradients and AdamW's moments, between steps."""
    shards = ranks if strategy == "FSDP2" else 1
    whole = {
        "weights": sizes.frozen + sizes.trained,
        "gradients": sizes.trained,
        "optimizer": 2 * sizes.trained,
    }
    return {name: value // shards for name, value in whole.items()}


def payloads(sizes: Sizes, strategy: str) -> dict[str, int]:
    """Bytes handed to the collectives of a step: what is reduced or gathered, whole."""
    if strategy == "DDP":
        return {"all-reduce": sizes.trained}
    gathered = 2 * (sizes.frozen + sizes.trained) - sizes.root
    return {"all-gather": gathered, "reduce-scatter": sizes.trained}


def sent(payload: dict[str, int], ranks: int, shares: dict[str, int] = RING) -> float:
    """Bytes that leave a rank in a step."""
    return (ranks - 1) / ranks * sum(shares[kind] * size for kind, size in payload.items())

"""LoHa (Hyeon-Woo et al., FedPara, arXiv 2108.06098): ``dW = s * (A1 B1) * (A2 B2)``, elementwise.

The product of two matrices of rank r has a rank of up to r squared (proposition 1). Names are
those of LyCORIS and PEFT, the start is PEFT's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Path, WeightInfo
from .matrix import MatrixDelta, matrix_size
from .tuning import DeltaTuning, check_finite, check_rank, one_rank


class LoHaDelta(MatrixDelta):
    """dW as the elementwise product of two low-rank matrices.

    Attributes:
        hada_w1_a: A1, ``[out, r]``.
        hada_w1_b: B1, ``[r, in * kernel]``.
        hada_w2_a: A2, shaped like A1.
        hada_w2_b: B2, shaped like B1; zero at the start.
    """

    def __init__(
        self,
        info: WeightInfo,
        rank: int,
        scale: float = 1.0,
        path: Path = "auto",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(info, scale, path, dropout)
        self.rank = rank
        self.hada_w1_a = self.factory(self.rows, rank)
        self.hada_w1_b = self.factory(rank, self.columns)
        self.hada_w2_a = self.factory(self.rows, rank)
        self.hada_w2_b = self.factory(rank, self.columns)
        self.reset_parameters()

    def tensors(self) -> tuple[Tensor, ...]:
        """A1, B1, A2, B2."""
        return self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b

    def matrix(self, *factors: Tensor) -> Tensor:
        """Multiplies the two products."""
        first, *others = factors
        dense: Tensor = _Hadamard.apply(self._scaled(first), *others)
        return dense

    def ranks(self) -> tuple[int, ...]:
        """The rank of either product."""
        return (self.rank,)

    def settings(self) -> dict[str, Any]:
        """Adds the rank."""
        return {"rank": self.rank, **super().settings()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform, and B2 zero."""
        for factor in self.tensors()[:3]:
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        self.hada_w2_b.zero_()


class _Hadamard(torch.autograd.Function):
    """``(A1 B1) * (A2 B2)``, which keeps the factors for backward and neither product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        return (a1 @ b1) * (a2 @ b2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad,), (a1, b1, a2, b2) = grads, ctx.saved_tensors
        first, second = grad * (a2 @ b2), grad * (a1 @ b1)
        return first @ b1.T, a1.T @ first, second @ b2.T, a2.T @ second


@dataclass(kw_only=True)
class LoHa(DeltaTuning):
    """LoHa for every weight that ``targets`` names; convolutions as matrices of their patches.

    Attributes:
        rank: The rank r of either product; clamped to the smaller side of each weight.
        alpha: The scale s is ``alpha / rank``.
    """

    rank: int = 8
    alpha: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)
        check_finite(self.alpha, "alpha")

    def build(self, info: WeightInfo, overrides: dict[str, Any]) -> LoHaDelta:
        """Makes the delta of one weight."""
        asked = one_rank("LoHa", info, overrides.get("rank_pattern", self.rank))
        rank = min(asked, *matrix_size(info))
        delta = LoHaDelta(info, rank, self.alpha / asked, self.path, self.dropout)
        delta.clamped = asked > rank
        return delta

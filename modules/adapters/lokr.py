"""LoKr (Yeh et al., LyCORIS, arXiv 2309.14859): ``dW = s * kron(C, B A)``, divided as in PEFT."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Path, WeightInfo
from .matrix import MatrixDelta
from .tuning import DeltaTuning, check_finite, check_rank, one_rank


class LoKrDelta(MatrixDelta):
    """dW as a Kronecker product, of which either factor may be a product of rank r itself.

    With ``out = j * k`` and ``in = m * n`` the factors have shapes ``[j, m]`` and
    ``[k, n * kernel]``. The second is a product if r is below half of the larger of k and n, the
    first, if asked for, by the same rule.

    Attributes:
        lokr_w1: C, or the two matrices that make it; the first is zero at the start.
        lokr_w2: B and A, or the one matrix in their place.
    """

    def __init__(
        self,
        info: WeightInfo,
        rank: int,
        decompose_factor: int = -1,
        decompose_both: bool = False,
        scale: float = 1.0,
        path: Path = "auto",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(info, scale, path, dropout)
        self.rank, self.factor, self.both = rank, decompose_factor, decompose_both
        inputs = info.shape[info.in_dim]
        (j, k), (m, n) = (divided(size, decompose_factor) for size in (self.rows, inputs))
        self.lokr_w1 = self._factors(j, m, decompose_both and rank < max(j, m) / 2)
        self.lokr_w2 = self._factors(k, n * (self.columns // inputs), rank < max(k, n) / 2)
        self.reset_parameters()

    def _factors(self, rows: int, columns: int, low_rank: bool) -> nn.ParameterList:
        shapes = [(rows, self.rank), (self.rank, columns)] if low_rank else [(rows, columns)]
        return nn.ParameterList([self.factory(*shape) for shape in shapes])

    def tensors(self) -> tuple[Tensor, ...]:
        """What makes C, and then what makes the other factor."""
        return (*self.lokr_w1, *self.lokr_w2)

    def matrix(self, *factors: Tensor) -> Tensor:
        """Multiplies each factor out, and takes their Kronecker product."""
        split = len(self.lokr_w1)
        first, second = (reduce(torch.matmul, part) for part in (factors[:split], factors[split:]))
        return torch.kron(self._scaled(first), second)

    def ranks(self) -> tuple[int, ...]:
        """The rank of the second factor."""
        return (min(self.rank, self.lokr_w2[0].shape[0], self.lokr_w2[-1].shape[1]),)

    def settings(self) -> dict[str, Any]:
        """Adds the rank and how the sides are divided."""
        divide = {"decompose_factor": self.factor, "decompose_both": self.both}
        return {"rank": self.rank, **divide, **super().settings()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All uniform but the first, which is zero."""
        for factor in self.tensors():
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        self.lokr_w1[0].zero_()


def divided(size: int, factor: int = -1) -> tuple[int, int]:
    """``size`` as the product of two numbers, the first of which is the factor if that divides it.

    If not, the first is the largest divisor that is above neither the factor nor the second; of
    ``factor=-1`` this is the most even division.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    first = next(n for n in range(limit, 0, -1) if size % n == 0)
    return first, size // first


@dataclass(kw_only=True)
class LoKr(DeltaTuning):
    """LoKr for every weight that ``targets`` names; convolutions as matrices of their patches.

    Attributes:
        rank: The rank r; of layers where it is no saving the factor is a whole matrix.
        alpha: The scale s is ``alpha / rank``.
        decompose_factor: How the sides of a weight are divided (see `divided`).
        decompose_both: Let C be a product of rank r too.
    """

    rank: int = 8
    alpha: float = 8.0
    decompose_factor: int = -1
    decompose_both: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)
        check_finite(self.alpha, "alpha")
        if self.decompose_factor != -1:  # which divides as evenly as can be
            check_rank(self.decompose_factor, "decompose_factor")

    def build(self, info: WeightInfo, overrides: dict[str, Any]) -> LoKrDelta:
        """Makes the delta of one weight."""
        rank = one_rank("LoKr", info, overrides.get("rank_pattern", self.rank))
        divide = self.decompose_factor, self.decompose_both
        delta = LoKrDelta(info, rank, *divide, self.alpha / rank, self.path, self.dropout)
        delta.clamped = rank > delta.ranks()[0]
        return delta

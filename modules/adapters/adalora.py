"""AdaLoRA (Zhang et al., arXiv 2303.10512): dW in the form of a singular value decomposition.

``W = W0 + s * P diag(E) Q`` (section 3.1). A rank budget (see `budget`) takes triplets
``(P[:, i], E[i], Q[i])`` away where they matter little. On a convolution Q is a k x k kernel and P
a 1 x 1 one, as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Delta, RankMode, WeightInfo
from .errors import AdapterError
from .lora import LoRADelta
from .matrix import refuse_stack
from .tucker import Factors
from .tuning import DeltaTuning, check_finite, check_rank, one_rank

STD = 0.02  # of P and Q at the start


class AdaLoRADelta(LoRADelta):
    """``dW = s * P diag(E) Q``, P widening the output mode; the tensors are named as in PEFT.

    Attributes:
        lora_A: Q, ``[r, ...]``, the stored shape without its output mode.
        lora_B: P, ``[out, r]``.
        lora_E: E, ``[r]``, zero at the start.
    """

    def make_factors(self) -> None:
        """Adds E."""
        super().make_factors()
        self.lora_E = self.factory(self.rank)

    def tensors(self) -> tuple[Tensor, ...]:
        """Q, P, then E."""
        return self.lora_A, self.lora_B, self.lora_E

    def compose(self, *factors: Tensor) -> Tensor:
        """Multiplies the three."""
        lora_A, lora_B, lora_E = factors
        return super().compose(_weighed(lora_A, lora_E), lora_B)

    def tucker(self) -> tuple[Tensor, Factors]:
        """diag(E) Q is the core; P the only factor."""
        return self._tucker(_weighed(self.lora_A, self.lora_E), self.lora_B)

    def rank_modes(self) -> list[RankMode]:
        """The triplets, all of which may go."""
        return [RankMode(0, (("lora_E", 0), ("lora_A", 0), ("lora_B", 1)), least=0)]

    def with_ranks(self, ranks: Sequence[int]) -> Delta:
        """The same delta with another number of triplets; the scale stays."""
        return self._like(rank=ranks[0])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """P and Q normal of standard deviation 0.02, E zero."""
        self.lora_E.zero_()
        for factor in (self.lora_A, self.lora_B):
            if not factor.is_meta:
                factor.normal_(0.0, STD)


def _weighed(lora_A: Tensor, lora_E: Tensor) -> Tensor:
    """diag(E) Q."""
    return lora_A * lora_E.view(-1, *[1] * (lora_A.ndim - 1))


def singular_factors(model: nn.Module) -> Iterator[nn.Parameter]:
    """P and Q of every AdaLoRA delta that trains."""
    for module in model.modules():
        if isinstance(module, AdaLoRADelta) and module.lora_E.requires_grad:
            yield from (module.lora_A, module.lora_B)


def orthogonality(model: nn.Module) -> Tensor:
    """How far the P and Q of a model are from orthonormal: what AdaLoRA adds to the loss.

    The mean over all P and Q of ``||P^T P - I||_F`` and ``||Q Q^T - I||_F``, as the authors and
    PEFT compute it; the paper's equation 4 has the squares, summed.

    Returns:
        A scalar that can be differentiated; the authors weigh it with 0.1, PEFT with 0.5.

    Raises:
        AdapterError: The model has no AdaLoRA delta that trains.
    """
    rows = [p.flatten(1) if i % 2 == 0 else p.t() for i, p in enumerate(singular_factors(model))]
    if not rows:
        raise AdapterError("there is no AdaLoRA that trains: orthogonality is of its P and Q")
    distances = [torch.linalg.norm(q @ q.t() - torch.eye(len(q)).to(q)) for q in rows]
    return torch.stack(distances).mean()


@dataclass(kw_only=True)
class AdaLoRA(DeltaTuning):
    """AdaLoRA for every weight that ``targets`` names.

    Without a rank budget, such as `litflora.callbacks.RankBudget`, no rank ever changes.

    Attributes:
        rank: The rank at the start, above the one that the budget leaves; clamped to the smaller
            side of each weight.
        alpha: The scale is ``alpha / rank``, of the rank at the start throughout.
    """

    rank: int = 12
    alpha: float = 32.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)
        check_finite(self.alpha, "alpha")

    def build(self, info: WeightInfo, overrides: dict[str, Any]) -> AdaLoRADelta:
        """Makes the delta of one weight."""
        refuse_stack(info)
        asked = one_rank("AdaLoRA", info, overrides.get("rank_pattern", self.rank))
        out = info.shape[info.out_dim]
        largest = min(out, math.prod(info.shape) // out)
        rank, scale = min(asked, largest), self.alpha / asked
        delta = AdaLoRADelta(info, rank, scale, self.path, self.dropout)
        delta.clamped = asked > largest
        return delta

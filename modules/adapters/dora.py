"""DoRA (Liu et al., arXiv 2402.09353): LoRA for the direction of each output, and its length.

``W' = m * (W0 + s B A) / ||W0 + s B A||`` (equation 5), with one norm for each output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .delta import WeightInfo
from .errors import AdapterError
from .lora import LoRA, LoRADelta
from .matrix import refuse_stack


class DoRADelta(LoRADelta):
    """``dW = W' - W0``.

    The norm is taken over all modes of the stored weight but the output's; where a transposed
    convolution has groups, these share that mode, and so a norm. It is a constant in backward, as
    section 4.3 of the paper has it. An output whose weight is zero is divided by the smallest
    number there is, not by zero.

    Attributes:
        magnitude: m, ``[out]``; the norms of W0 at the start.
    """

    def make_factors(self) -> None:
        """Adds m."""
        super().make_factors()
        self.magnitude = self.factory(self.info.shape[self.info.out_dim])

    def tensors(self) -> tuple[Tensor, ...]:
        """A, B, m and the base weight: all of it, also of a part, for it is kept as it is."""
        assert self.base is not None, "bind comes first"
        return self.lora_A, self.lora_B, self.magnitude, self.base.whole()

    def compose(self, *factors: Tensor) -> Tensor:
        """``W' - W0`` as ``(q - 1) W0 + s (q B) A``, where q is m over the norm.

        So written, autograd keeps the factors and the base, and no matrix of the base's size.
        """
        lora_A, lora_B, magnitude, whole = factors
        assert self.base is not None
        weight = self.base.own(whole)
        ratio = magnitude / self._norm(lora_A, lora_B, weight)
        by_row = ratio.view([-1 if n == self.info.out_dim else 1 for n in range(weight.dim())])
        low_rank = super().compose(lora_A, ratio.unsqueeze(1) * lora_B)
        return low_rank + self._masked((by_row - 1) * weight)

    @torch.no_grad()
    def _norm(self, lora_A: Tensor, lora_B: Tensor, weight: Tensor) -> Tensor:
        moved = weight + super().compose(lora_A, lora_B)
        others = [n for n in range(moved.dim()) if n != self.info.out_dim]
        norm: Tensor = torch.linalg.vector_norm(moved, dim=others)
        return norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def tucker(self) -> None:
        """There is none: dW holds a share of W0."""

    def reset_parameters(self) -> None:
        """Draws A anew; B is zero and m the norm of W, once there is one."""
        super().reset_parameters()
        if self.base is not None:
            self.start()

    @torch.no_grad()
    def start(self) -> None:
        """``m = ||W0||``, computed as ever after: on this device the start is the very base."""
        self.magnitude.copy_(self._norm(self.lora_A, self.lora_B, self.weight()))


@dataclass(kw_only=True)
class DoRA(LoRA):
    """DoRA for every weight that ``targets`` names; its settings are those of LoRA.

    It has no side path: dropout is refused, and on a base in half precision W' is rounded to the
    base's type. Convolutions have PEFT's form alone.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conv != "peft":
            raise AdapterError(f"DoRA has convolutions in the form 'peft' alone, not {self.conv!r}")

    def delta_class(self, info: WeightInfo) -> type[LoRADelta]:
        """The one class, for all but stacks of matrices."""
        refuse_stack(info)
        return DoRADelta

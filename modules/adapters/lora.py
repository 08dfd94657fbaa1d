"""LoRA (Hu et al., arXiv 2106.09685): ``W = W0 + s * B A``.

On a convolution "LoRA" has meant three things, whose sizes differ by up to the kernel's width;
`LoRA.conv` chooses between them, so that comparisons can say which one they made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .delta import Delta, Path, WeightInfo
from .errors import AdapterError
from .tucker import Factors, expand
from .tuning import DeltaTuning, check_finite, check_rank, one_rank

ConvForm = Literal["peft", "loralib", "article"]
Shapes = tuple[tuple[int, ...], tuple[int, ...]]


class LoRADelta(Delta):
    """``dW = s * B A``, B widening the output mode: on convolutions the form of PEFT.

    Attributes:
        lora_A: ``[r, ...]``, the stored shape without its output mode.
        lora_B: ``[out, r]``.
        lr_ratio: The learning rate of B over that of A.
    """

    def __init__(
        self,
        info: WeightInfo,
        rank: int,
        scale: float = 1.0,
        path: Path = "auto",
        dropout: float = 0.0,
        lr_ratio: float = 1.0,
    ) -> None:
        super().__init__(info, scale, path, dropout)
        self.rank = rank
        self.lr_ratio = lr_ratio
        self.make_factors()
        self.reset_parameters()

    def make_factors(self) -> None:
        """Makes the parameters, without values; what derives from LoRA adds its own."""
        shape_A, shape_B = self.shapes(self.info, self.rank)
        self.lora_A = self.factory(*shape_A)
        self.lora_B = self.factory(*shape_B)

    @staticmethod
    def shapes(info: WeightInfo, rank: int) -> Shapes:
        """Shapes of A and B."""
        rest = [size for n, size in enumerate(info.shape) if n != info.out_dim]
        return (rank, *rest), (info.shape[info.out_dim], rank)

    def tensors(self) -> tuple[Tensor, ...]:
        """A, then B."""
        return self.lora_A, self.lora_B

    def compose(self, *factors: Tensor) -> Tensor:
        """Multiplies B by A."""
        lora_A, lora_B = self.pair(*factors)
        return self._masked(expand(*self._tucker(self._scaled(lora_A), lora_B)))

    def tucker(self) -> tuple[Tensor, Factors] | None:
        """A is the core; B the only factor."""
        return self._tucker(*self.pair(*self.tensors()))

    def pair(self, *factors: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of the product that dW is, but for the scale, from what ``tensors`` gives."""
        lora_A, lora_B = factors
        return lora_A, lora_B

    def _tucker(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Factors]:
        factors: list[Tensor | None] = [None] * len(self.info.shape)
        factors[self.info.out_dim] = lora_B
        return lora_A.movedim(0, self.info.out_dim), factors

    def ranks(self) -> tuple[int, ...]:
        """The one rank."""
        return (self.rank,)

    def settings(self) -> dict[str, Any]:
        """Adds the rank and the ratio of learning rates."""
        return {"rank": self.rank, "lr_ratio": self.lr_ratio, **super().settings()}

    def rates(self) -> dict[str, float]:
        """That of B; none for an embedding, whose factors have each other's roles.

        PEFT's ``create_loraplus_optimizer`` makes that exception too.
        """
        return {} if self.info.kind == "embedding" else {"lora_B": self.lr_ratio}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in PEFT: A uniform and B zero; for embeddings A zero and B normal."""
        if self.lora_A.is_meta:
            return
        if self.info.kind == "embedding":
            self.lora_A.zero_()
            self.lora_B.normal_()
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            self.lora_B.zero_()


class LoralibConvDelta(LoRADelta):
    """The ConvLoRA of loralib: B A, of rank r * k, read row by row as the kernel."""

    @staticmethod
    def shapes(info: WeightInfo, rank: int) -> Shapes:
        """``A: [r k, in k]`` and ``B: [out / groups * k, r k]``."""
        out, per_group, k, _ = info.shape
        fan_in = per_group * info.groups
        return (rank * k, fan_in * k), (out // info.groups * k, rank * k)

    def compose(self, *factors: Tensor) -> Tensor:
        """Multiplies and reads the product as the kernel."""
        lora_A, lora_B = factors
        return (lora_B @ self._scaled(lora_A)).reshape(self.info.shape)

    def tucker(self) -> None:
        """There is none: the reading mixes channels and taps."""


class ArticleConvDelta(LoRADelta):
    """The LoRA of the FLoRA article: rank r on the ``(out kh) x (in kw)`` matrix of the kernel."""

    @staticmethod
    def shapes(info: WeightInfo, rank: int) -> Shapes:
        """``A: [r, in kw]`` and ``B: [out kh, r]``."""
        out, per_group, kh, kw = info.shape
        return (rank, per_group * kw), (out * kh, rank)

    def compose(self, *factors: Tensor) -> Tensor:
        """``dW[o, i, y, x] = s * sum_r B[o y, r] A[r, i x]``."""
        lora_A, lora_B = factors
        out, per_group, kh, kw = self.info.shape
        product = lora_B @ self._scaled(lora_A)
        return product.view(out, kh, per_group, kw).transpose(1, 2)

    def tucker(self) -> None:
        """There is none: each factor holds one kernel mode."""


class BatchedLoRADelta(LoRADelta):
    """One LoRA for each matrix of a stacked parameter, such as fused experts ``[E, in, out]``."""

    @staticmethod
    def shapes(info: WeightInfo, rank: int) -> Shapes:
        """``A: [..., r, last]`` and ``B: [..., last but one, r]``."""
        *lead, rows, columns = info.shape
        return (*lead, rank, columns), (*lead, rows, rank)

    def compose(self, *factors: Tensor) -> Tensor:
        """Multiplies matrix by matrix."""
        lora_A, lora_B = factors
        return lora_B @ self._scaled(lora_A)

    def tucker(self) -> None:
        """There is none: the matrices share nothing."""


_CONV_FORMS: dict[str, type[LoRADelta]] = {
    "peft": LoRADelta,
    "loralib": LoralibConvDelta,
    "article": ArticleConvDelta,
}


def conv_parameter_counts(info: WeightInfo, rank: int) -> dict[str, int]:
    """How many parameters LoRA of one rank has on a weight, under each of the three formulae.

    On a linear layer the three are one. A form that is not defined for the weight is left out.
    """
    counts = {}
    for form in _CONV_FORMS:
        try:
            cls = delta_class(info, form)
        except AdapterError:
            continue
        counts[form] = sum(math.prod(shape) for shape in cls.shapes(info, rank))
    return counts


def delta_class(info: WeightInfo, form: str) -> type[LoRADelta]:
    """Which delta a weight gets; raises if the form is not defined for it."""
    if info.kind == "parameter" and len(info.shape) > 2:
        return BatchedLoRADelta
    if form == "peft" or info.kind not in ("conv", "depthwise"):
        return _CONV_FORMS["peft"]
    square = len(info.shape) == 4 and info.shape[2] == info.shape[3] and info.out_dim == 0
    if not square:
        raise AdapterError(
            f"conv={form!r} is defined for square 2-D kernels alone, and {info.name} has shape "
            f"{list(info.shape)}. Use conv='peft' or exclude that layer"
        )
    return _CONV_FORMS[form]


@dataclass(kw_only=True)
class LoRA(DeltaTuning):
    """LoRA for every weight that ``targets`` names.

    Attributes:
        rank: The rank r; clamped to the smaller side of each weight.
        alpha: The scale is ``alpha / rank``.
        rank_stabilized: The scale is ``alpha / sqrt(rank)`` (arXiv 2312.03732).
        lr_ratio: The learning rate of B over that of A (LoRA+, arXiv 2402.12354, which finds 16 a
            good one); embeddings have one rate.
        conv: Which LoRA a convolution gets: "peft" (k x k to rank r, then 1 x 1), "loralib"
            (rank r * k) or "article" (the formula that the FLoRA article counts by).
        alpha_pattern: Alphas of their own for the layers that a pattern names.
    """

    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = False
    lr_ratio: float = 1.0
    conv: ConvForm = "peft"
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)
        if self.conv not in _CONV_FORMS:
            raise AdapterError(f"conv must be one of {', '.join(_CONV_FORMS)}, not {self.conv!r}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            check_finite(alpha, "alpha")
        check_finite(self.lr_ratio, "lr_ratio")
        if self.lr_ratio <= 0:
            raise AdapterError(f"lr_ratio must be above 0, not {self.lr_ratio}")

    def patterns(self) -> dict[str, dict[str, Any]]:
        """Adds the alphas."""
        return {**super().patterns(), "alpha_pattern": dict(self.alpha_pattern)}

    def build(self, info: WeightInfo, overrides: dict[str, Any]) -> LoRADelta:
        """Makes the delta of one weight."""
        asked = one_rank(type(self).__name__, info, overrides.get("rank_pattern", self.rank))
        alpha = overrides.get("alpha_pattern", self.alpha)
        divide_by: Callable[[float], float] = math.sqrt if self.rank_stabilized else float
        cls = self.delta_class(info)
        # The scale follows the rank that was asked for: clamping must not make a delta louder.
        largest = _largest_rank(cls, info)
        delta = cls(
            info,
            min(asked, largest),
            scale=alpha / divide_by(asked),
            path=self.path,
            dropout=self.dropout,
            lr_ratio=self.lr_ratio,
        )
        delta.clamped = asked > largest
        return delta

    def delta_class(self, info: WeightInfo) -> type[LoRADelta]:
        """The class of a weight's delta, by the weight's kind and ``conv``."""
        return delta_class(info, self.conv)


def _largest_rank(cls: type[LoRADelta], info: WeightInfo) -> int:
    """The rank at which B A reaches every matrix of its shape."""
    shape_A, shape_B = cls.shapes(info, 1)
    if cls is LoralibConvDelta:  # its matrices have rank r * k
        return max(1, min(shape_A[1], shape_B[0]) // info.shape[2])
    if cls is BatchedLoRADelta:
        return min(info.shape[-2:])
    return min(math.prod(shape_A), shape_B[0])

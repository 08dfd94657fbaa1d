"""FLoRA: a Tucker decomposition of the change of a weight, in the weight's own shape.

``W = W0 + s * G x_1 A_1 x_2 A_2 ... x_N A_N`` (Si et al., arXiv 2405.14739, equation 4 for
convolutions). Grouped and depthwise kernels are decomposed as they are stored,
``[out, in / groups, kh, kw]``; a mode of size 1 carries no factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .delta import Delta, Path, RankMode, WeightInfo
from .errors import AdapterError
from .tucker import Factors, expand
from .tuning import DeltaTuning, check_finite, check_rank

Init = Literal["width", "paper"]


class FLoRADelta(Delta):
    """dW as a core tensor and one factor for each mode.

    Attributes:
        core: ``[J_1, ..., J_N]``, zero at the start.
        factors: ``{str(n): [I_n, J_n]}`` for each mode that carries a factor.
    """

    def __init__(
        self,
        info: WeightInfo,
        ranks: list[int],
        scale: float = 1.0,
        path: Path = "auto",
        dropout: float = 0.0,
        init: Init = "width",
        frozen_modes: list[int] | None = None,
    ) -> None:
        super().__init__(info, scale, path, dropout)
        self.init = init
        self.frozen_modes = list(frozen_modes or [])
        self.core = self.factory(*ranks)
        self.factors = nn.ParameterDict(
            {
                str(n): self.factory(size, rank)
                for n, (size, rank) in enumerate(zip(info.shape, ranks, strict=True))
                if size > 1
            }
        )
        for n in self.frozen_modes:
            if str(n) in self.factors:
                self.factors[str(n)].requires_grad_(False)
        self.reset_parameters()

    def frozen(self) -> set[str]:
        """The factors of the frozen modes."""
        return {f"factors.{n}" for n in self.frozen_modes}

    def tensors(self) -> tuple[Tensor, ...]:
        """The core, then the factors by mode."""
        return (self.core, *self._by_mode().values())

    def compose(self, *factors: Tensor) -> Tensor:
        """Expands the core by its factors."""
        core, *by_mode = factors
        return self._masked(expand(self._scaled(core), self._in_order(by_mode)))

    def tucker(self) -> tuple[Tensor, Factors]:
        """The core and its factors."""
        return self.core, self._in_order(self._by_mode().values())

    def _by_mode(self) -> dict[str, Any]:
        # ParameterDict's own ``values`` look each up as an attribute, which takes longer; under
        # FSDP1 attributes are all there is during a call.
        return self.factors._parameters or dict(self.factors.items())

    def _in_order(self, factors: Iterable[Tensor]) -> Factors:
        """One factor for each mode; None for those of size 1."""
        by_mode = iter(factors)
        return [next(by_mode) if size > 1 else None for size in self.info.shape]

    def ranks(self) -> tuple[int, ...]:
        """The core's shape."""
        return tuple(self.core.shape)

    def rank_modes(self) -> list[RankMode]:
        """One for each mode with a factor: slices of the core, each with a column of the factor."""
        return [
            RankMode(int(n), (("core", int(n)), (f"factors.{n}", 1)), least=1) for n in self.factors
        ]

    def with_ranks(self, ranks: Sequence[int]) -> Delta:
        """The same delta with a core of another shape."""
        return self._like(ranks=list(ranks))

    def settings(self) -> dict[str, Any]:
        """Adds the ranks, the start and the frozen modes."""
        own = {"ranks": list(self.ranks()), "init": self.init, "frozen_modes": self.frozen_modes}
        return {**super().settings(), **own}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero core, so that dW = 0; factors by ``init``."""
        self.core.zero_()
        for mode, factor in self.factors.items():
            if factor.is_meta:
                continue
            if self.init == "paper":
                # The authors' Kaiming call sees the rank as its fan-in.
                factor.normal_(0.0, math.sqrt(0.5 / factor.shape[1]))
            else:
                _width_normalised(factor, int(mode), self.info)


def _width_normalised(factor: Tensor, mode: int, info: WeightInfo) -> None:
    """A start whose effect on the output does not depend on the layer's width.

    Unit inputs leave the input factor with unit variance, the output factor keeps the core's
    variance, and kernel factors are orthonormal, so that LoRA's learning rate fits at scale 1.
    """
    if mode in info.spatial:
        factor.copy_(_cosine_basis(*factor.shape).to(factor))
    elif mode == info.in_dim and info.kind != "embedding":
        factor.normal_(0.0, 1 / math.sqrt(factor.shape[0]))
    elif mode == info.in_dim:  # an embedding's input is one-hot: one row is the whole sum
        factor.normal_()
    else:
        factor.normal_(0.0, 1 / math.sqrt(factor.shape[1]))


def _cosine_basis(size: int, rank: int) -> Tensor:
    """The ``rank`` smoothest columns of the orthonormal cosine transform; the identity if full."""
    if rank == size:
        return torch.eye(size, dtype=torch.float64)
    points = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    basis = torch.cos(math.pi * points[:, None] * torch.arange(rank, dtype=torch.float64))
    return basis / basis.norm(dim=0)


@dataclass(kw_only=True)
class FLoRA(DeltaTuning):
    """FLoRA for every weight that ``targets`` names.

    Ranks are clamped to the size of their mode, layer by layer.

    Attributes:
        rank: Rank of the input and output modes (r1, r2 of the paper).
        spatial_rank: Rank of the kernel modes (r3, r4), one number or one for each.
        scale: The factor s of the paper: 1 with ``init="width"``; the paper reports 4 for
            ConvNeXt-L and 0.04 for InternViT-6B and LLaVA-7B with ``init="paper"``.
        init: "width" normalises by the layer's width, so that LoRA's learning rate transfers;
            "paper" is the authors' start, of standard deviation sqrt(0.5 / rank).
        freeze_factors: Train the cores alone.
        freeze_spatial: Keep the kernel factors as they start.
        scale_pattern: Scales of their own for the layers that a pattern names.
    """

    rank: int = 8
    spatial_rank: int | list[int] = 2
    scale: float = 1.0
    init: Init = "width"
    freeze_factors: bool = False
    freeze_spatial: bool = False
    scale_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)
        spatial = self.spatial_rank
        for rank in spatial if isinstance(spatial, (list, tuple)) else [spatial]:
            check_rank(rank, "spatial_rank")
        if self.init not in ("width", "paper"):
            raise AdapterError(f"init must be 'width' or 'paper', not {self.init!r}")
        for scale in (self.scale, *self.scale_pattern.values()):
            check_finite(scale, "scale")

    def patterns(self) -> dict[str, dict[str, Any]]:
        """Adds the scales."""
        return {**super().patterns(), "scale_pattern": dict(self.scale_pattern)}

    def build(self, info: WeightInfo, overrides: dict[str, Any]) -> FLoRADelta:
        """Makes the delta of one weight."""
        asked = self.asked_ranks(info, overrides.get("rank_pattern", self.rank))
        everything, kernel = range(len(info.shape)), info.spatial
        frozen = everything if self.freeze_factors else kernel if self.freeze_spatial else ()
        delta = FLoRADelta(
            info,
            [min(rank, size) for rank, size in zip(asked, info.shape, strict=True)],
            scale=overrides.get("scale_pattern", self.scale),
            path=self.path,
            dropout=self.dropout,
            init=self.init,
            frozen_modes=list(frozen),
        )
        delta.clamped = any(r > n > 1 for r, n in zip(asked, info.shape, strict=True))
        return delta

    def asked_ranks(self, info: WeightInfo, rank: int | list[int]) -> list[int]:
        """The rank asked for in each mode, before clamping."""
        modes = len(info.shape)
        if isinstance(rank, (list, tuple)):
            if len(rank) != modes:
                raise AdapterError(
                    f"{info.name} has {modes} modes, but rank_pattern gives it {len(rank)} ranks: "
                    f"{list(rank)}. Give one number or {modes}"
                )
            return list(rank)
        spatial = self.spatial_rank
        if (
            isinstance(spatial, (list, tuple))
            and info.spatial
            and len(spatial) != len(info.spatial)
        ):
            raise AdapterError(
                f"{info.name} has {len(info.spatial)} kernel modes, but spatial_rank is "
                f"{list(spatial)}. Give one number or {len(info.spatial)}"
            )
        ranks = [rank] * modes
        for n, mode in enumerate(info.spatial):
            ranks[mode] = spatial[n] if isinstance(spatial, (list, tuple)) else spatial
        return ranks

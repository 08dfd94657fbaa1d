"""LoRA that begins from the weight itself: PiSSA and OLoRA.

Both are defined by a change of the base: W becomes ``W - s B0 A0``, and B and A train from B0 and
A0. Here the base stays what it was, and the same function is ``dW = s (B A - B0 A0)``. B0 and A0
are kept beside B and A, also in files: a decomposition made again may have other signs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .delta import WeightInfo
from .errors import AdapterError
from .lora import LoRA, LoRADelta, delta_class


class StartedDelta(LoRADelta):
    """``dW = s (B A - B0 A0)``, where B0 and A0 come from the weight.

    Attributes:
        start_A: A0, of the shape of A.
        start_B: B0, of the shape of B. Both are parameters that never train: buffers would be sent
            around by DDP at every step.
    """

    def make_factors(self) -> None:
        """Adds A0 and B0."""
        super().make_factors()
        self.start_A = self.factory(*self.lora_A.shape).requires_grad_(False)
        self.start_B = self.factory(*self.lora_B.shape).requires_grad_(False)

    def frozen(self) -> set[str]:
        """The start."""
        return {"start_A", "start_B"}

    def decomposed(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """``B0: [out, r]`` and ``A0: [r, in]`` of a weight ``[out, in]``."""
        raise NotImplementedError

    @torch.no_grad()
    def start(self) -> None:
        """Begins from the weight, of which a convolution's is read as ``[out, in * kernel]``."""
        weight = self.weight()
        if weight.is_meta:
            return
        matrix = weight.to(self.info.dtype).movedim(self.info.out_dim, 0).flatten(1)
        if not bool(torch.isfinite(matrix).all()):
            raise AdapterError(f"{self.info.name} holds a NaN or an infinity: mend or exclude it")
        start_B, start_A = self.decomposed(matrix)
        self.lora_B.copy_(start_B)
        self.lora_A.copy_(start_A.view_as(self.lora_A))
        self._note_start()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the factors as LoRA does, and takes them for the start."""
        super().reset_parameters()
        self._note_start()

    def _note_start(self) -> None:
        self.start_A.copy_(self.lora_A)
        self.start_B.copy_(self.lora_B)

    def tensors(self) -> tuple[Tensor, ...]:
        """A, B, A0 and B0."""
        return self.lora_A, self.lora_B, self.start_A, self.start_B

    def pair(self, *factors: Tensor) -> tuple[Tensor, Tensor]:
        """``[A; A - A0]`` and ``[B - B0, B0]``: B A - B0 A0, and exactly zero at the start."""
        lora_A, lora_B, start_A, start_B = factors
        return torch.cat([lora_A, lora_A - start_A]), torch.cat([lora_B - start_B, start_B], 1)


class PiSSADelta(StartedDelta):
    """LoRA that begins from the largest singular triplets of the weight."""

    def decomposed(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """``U sqrt(S / s)`` and ``sqrt(S / s) V^T`` (section 3 of the article)."""
        return low_rank(matrix / self.scale, self.rank)


class OLoRADelta(StartedDelta):
    """LoRA that begins from the QR decomposition of the weight."""

    def decomposed(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The first columns of Q and the first rows of R; the scale stays out, as in PEFT."""
        q, r = torch.linalg.qr(matrix)
        return q[:, : self.rank], r[: self.rank]


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B and A of the nearest matrix of a rank, each with the roots of singular values."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * v[:rank]


def check_scale(tuning: LoRA) -> None:
    """Raises if some scale is zero, where the start is divided by it."""
    if 0 in (tuning.alpha, *tuning.alpha_pattern.values()):
        raise AdapterError(f"{type(tuning).__name__} divides by the scale: alpha must not be 0")


@dataclass(kw_only=True)
class PiSSA(LoRA):
    """PiSSA (Meng et al., arXiv 2404.02948) for every weight that ``targets`` names.

    It trains what the weight has most of: B and A begin as its r largest singular triplets. The
    article has ``alpha = rank``. Dropout acts on the input of ``s (B A - B0 A0)``, so that it too
    leaves the start as the base has it.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self)

    def delta_class(self, info: WeightInfo) -> type[LoRADelta]:
        """That of PiSSA, where it is defined."""
        return _of_a_matrix(PiSSADelta, info, self)


@dataclass(kw_only=True)
class OLoRA(LoRA):
    """OLoRA (Büyükakyüz, arXiv 2406.01775) for every weight that ``targets`` names.

    B begins with orthonormal columns: those of Q in the weight's QR decomposition.
    """

    def delta_class(self, info: WeightInfo) -> type[LoRADelta]:
        """That of OLoRA, where it is defined."""
        return _of_a_matrix(OLoRADelta, info, self)


def _of_a_matrix(cls: type[StartedDelta], info: WeightInfo, tuning: LoRA) -> type[LoRADelta]:
    """The class itself; raises where LoRA is no product of two matrices."""
    if delta_class(info, tuning.conv) is not LoRADelta:
        raise AdapterError(
            f"{type(tuning).__name__} begins from one matrix, and {info.name} has shape "
            f"{list(info.shape)}: exclude it, or take conv='peft' if it is a convolution"
        )
    return cls

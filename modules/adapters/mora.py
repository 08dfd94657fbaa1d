"""MoRA (Jiang et al., arXiv 2405.12130): one square matrix in the place of LoRA's two thin ones.

``dW x = decompress(M compress(x))``, where M has as many numbers as LoRA's A and B (section 3).
Compressing and decompressing are linear and have no parameters, so dW is made from M itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta import Path, WeightInfo
from .errors import AdapterError
from .matrix import MatrixDelta, matrix_size
from .tuning import DeltaTuning, check_rank, one_rank

MoRAKind = Literal["sharing", "rope"]


class MoRADelta(MatrixDelta):
    """dW as copies of M, one for each chunk of the input.

    The input is cut into chunks as long as M, the last of which is filled up from the input's
    beginning. "sharing" adds the chunks up and repeats the output of M over the rows (the
    authors' type 1). "rope" turns chunk i as rotary embeddings turn position i and lays the
    outputs one behind the other, cut off or repeated to fill the rows (their type 6).

    Attributes:
        square: M, ``[side, side]``, zero at the start.
    """

    def __init__(
        self,
        info: WeightInfo,
        side: int,
        kind: MoRAKind = "rope",
        scale: float = 1.0,
        path: Path = "auto",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(info, scale, path, dropout)
        self.kind: MoRAKind = kind
        self.square = self.factory(side, side)
        self.reset_parameters()

    def matrix(self, *factors: Tensor) -> Tensor:
        """Tiles M, and folds the columns of what was filled up onto the first ones."""
        (square,) = factors
        square = self._scaled(square)
        chunks = math.ceil(self.columns / len(square))
        tiled = square.repeat(1, chunks) if self.kind == "sharing" else self._turned(square, chunks)
        own, filled = tiled[:, : self.columns], tiled[:, self.columns :]
        folded = own + F.pad(filled, (0, self.columns - filled.shape[1]))
        return folded.repeat(math.ceil(self.rows / len(folded)), 1)[: self.rows]

    def _turned(self, square: Tensor, chunks: int) -> Tensor:
        """M times the rotation of each chunk, along a diagonal of blocks."""
        side, kept = len(square), min(chunks, math.ceil(self.rows / len(square)))
        # In half precision the angles would be others than where it is merged.
        dtype, device = torch.promote_types(square.dtype, torch.float32), square.device
        pairs = torch.arange(0, side, 2, dtype=dtype, device=device)
        positions = torch.arange(kept, dtype=dtype, device=device)
        angles = torch.outer(positions, 10000.0 ** (-pairs / side)).repeat(1, 2).unsqueeze(1)
        left, right = square.chunk(2, 1)
        cosines, sines = angles.cos().to(square.dtype), angles.sin().to(square.dtype)
        blocks = square * cosines + torch.cat([right, -left], 1) * sines
        # The outputs of later chunks would be cut off: they are not made.
        return F.pad(torch.block_diag(*blocks), (0, (chunks - kept) * side))

    def ranks(self) -> tuple[int, ...]:
        """The side of M."""
        return (len(self.square),)

    def settings(self) -> dict[str, Any]:
        """Adds the side and the kind."""
        return {"side": len(self.square), "kind": self.kind, **super().settings()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """M = 0."""
        self.square.zero_()


@dataclass(kw_only=True)
class MoRA(DeltaTuning):
    """MoRA for every weight that ``targets`` names. It has no scale and no side path.

    Attributes:
        rank: The rank of the LoRA that has as many parameters: the side of M is
            ``sqrt((in + out) * rank)``, rounded, but no more than the smaller side of the weight.
        kind: "sharing" or "rope" (types 1 and 6 of the authors' code); they advise the first for
            large ranks and the second for small ones.
    """

    rank: int = 8
    kind: MoRAKind = "rope"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)
        if self.kind not in get_args(MoRAKind):
            allowed = " or ".join(map(repr, get_args(MoRAKind)))
            raise AdapterError(f"kind must be {allowed}, not {self.kind!r}")

    def build(self, info: WeightInfo, overrides: dict[str, Any]) -> MoRADelta:
        """Makes the delta of one weight."""
        rank = one_rank("MoRA", info, overrides.get("rank_pattern", self.rank))
        rows, columns = matrix_size(info)
        asked = int(math.sqrt((rows + columns) * rank) + 0.5)
        side = min(asked, rows, columns)
        if self.kind == "rope":  # which turns pairs
            side = max(2, side // 2 * 2)
        delta = MoRADelta(info, side, self.kind, path=self.path, dropout=self.dropout)
        delta.clamped = asked > min(rows, columns)
        return delta

"""Deltas of methods that are defined for matrices, on weights of any shape."""

from __future__ import annotations

import math

from torch import Tensor

from .delta import Delta, Path, WeightInfo
from .errors import AdapterError


def matrix_size(info: WeightInfo) -> tuple[int, int]:
    """Rows and columns of a weight as the matrix ``[out, in / groups * kernel]``.

    Raises:
        AdapterError: The weight is a stack of matrices.
    """
    refuse_stack(info)
    rows = info.shape[info.out_dim]
    return rows, math.prod(info.shape) // rows


def refuse_stack(info: WeightInfo) -> None:
    """Raises if a weight is no one matrix or kernel, but a stack of them, such as fused experts."""
    if info.kind == "parameter" and len(info.shape) > 2:
        raise AdapterError(
            f"{info.name} is a stack of matrices, {list(info.shape)}, for which this method is not "
            "defined: adapt it by LoRA or FLoRA, or exclude it"
        )


class MatrixDelta(Delta):
    """A delta that is made as a matrix and then laid out as the weight is stored.

    The rows are the weight's output mode, the columns all its other modes in their order: a
    convolution is taken as the linear map of its patches, an embedding as that of one-hot words.
    """

    def __init__(
        self, info: WeightInfo, scale: float = 1.0, path: Path = "auto", dropout: float = 0.0
    ) -> None:
        super().__init__(info, scale, path, dropout)
        self.rows, self.columns = matrix_size(info)

    def matrix(self, *factors: Tensor) -> Tensor:
        """Makes dW as ``[rows, columns]``, with the scale, from ``factors``."""
        raise NotImplementedError

    def compose(self, *factors: Tensor) -> Tensor:
        """Lays the matrix out in the stored shape."""
        out = self.info.out_dim
        rest = [size for n, size in enumerate(self.info.shape) if n != out]
        dense = self.matrix(*factors).reshape(self.rows, *rest).movedim(0, out)
        return self._masked(dense)

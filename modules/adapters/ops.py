"""The base operations: how each layer type runs with another weight, and beside a low-rank chain.

An operation is a pair of functions over the layer; a layer type without one (attention, a custom
forward, a raw parameter) runs its own forward with the weight put in its place (see `layers`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .delta import Delta
from .paths import Total, compute_dtype, merged_conv, merged_linear, without_autocast
from .tucker import expand, mode_product

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Op:
    """How one layer type computes.

    Attributes:
        merged: ``(layer, args, total) -> y`` with the weight ``W + dW``.
        side: ``(layer, args, delta) -> y`` of dW alone, by its low-rank chain, without scale.
    """

    merged: Callable[[Any, tuple[Any, ...], Total], Tensor]
    side: Callable[[Any, tuple[Any, ...], Delta], Tensor]


def op_of(cls: type[nn.Module]) -> Op | None:
    """The operation of a layer class, or None if its forward is not one that is known here."""
    for base, op in _OPS.items():
        if issubclass(cls, base) and cls.forward is base.forward and _same_conv(cls, base):
            return op
    return _CONV1D if is_conv1d(cls) else None


def is_conv1d(cls: type) -> bool:
    """Whether ``cls`` is transformers' Conv1D, a linear layer that stores ``[in, out]``."""
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def _same_conv(cls: type, base: type) -> bool:
    return getattr(cls, "_conv_forward", None) is getattr(base, "_conv_forward", None)


def rows(x: Tensor, delta: Delta) -> int:
    """Positions that the layer maps."""
    if delta.info.kind == "embedding":
        return x.numel()
    channels = delta.info.shape[delta.info.in_dim]
    if delta.info.out_dim == 0:
        channels *= delta.info.groups
    return x.numel() // max(1, channels)


def dropped(x: Tensor, delta: Delta) -> Tensor:
    """The input of a delta, with its dropout."""
    return F.dropout(x, delta.dropout, delta.training) if delta.dropout > 0 else x


# Linear layers ----------------------------------------------------------------------------------


def _linear_merged(layer: nn.Linear, args: tuple[Any, ...], total: Total) -> Tensor:
    return merged_linear(args[0], layer.weight, total, layer.bias)


def _linear_side(layer: nn.Linear, args: tuple[Any, ...], delta: Delta) -> Tensor:
    core, (widen, narrow) = _tucker(delta, compute_dtype(args[0]))
    return _chain(dropped(args[0], delta), core, widen, narrow)


def _chain(x: Tensor, core: Tensor, widen: Tensor | None, narrow: Tensor | None) -> Tensor:
    """``x N C^T B^T`` for the core C ``[r_out, r_in]``, B ``[out, r_out]`` and N ``[in, r_in]``."""
    if narrow is None:
        x = F.linear(x, core)
        return x if widen is None else F.linear(x, widen)
    # B C costs out * r * r once; C on its own would cost rows * r * r and keep an intermediate.
    return F.linear(x @ narrow, core if widen is None else widen @ core)


def _conv1d_merged(layer: Any, args: tuple[Any, ...], total: Total) -> Tensor:
    x = args[0]
    y = merged_linear(
        x.reshape(-1, x.shape[-1]), layer.weight.T, _TransposedTotal(total), layer.bias
    )
    return y.view(*x.shape[:-1], layer.weight.shape[1])


def _conv1d_side(layer: Any, args: tuple[Any, ...], delta: Delta) -> Tensor:
    core, (narrow, widen) = _tucker(delta, compute_dtype(args[0]))
    return _chain(dropped(args[0], delta), core.T, widen, narrow)


class _TransposedTotal(Total):
    """The sum of the deltas of a ``[in, out]`` weight, as ``[out, in]``."""

    def __init__(self, total: Total) -> None:
        super().__init__(total.terms)

    def __call__(self, *tensors: Tensor) -> Tensor:
        return super().__call__(*tensors).T


# Embeddings -------------------------------------------------------------------------------------


def _embedding_merged(layer: nn.Embedding, args: tuple[Any, ...], total: Total) -> Tensor:
    # The look-up's backward keeps the indices alone, so W + dW is not kept here either.
    weight = layer.weight + total(*total.tensors())
    return F.embedding(
        args[0],
        weight.to(layer.weight.dtype),
        layer.padding_idx,
        scale_grad_by_freq=layer.scale_grad_by_freq,
    )


def _embedding_side(layer: nn.Embedding, args: tuple[Any, ...], delta: Delta) -> Tensor:
    indices = args[0]
    core, (rows_factor, widen) = _tucker(delta, layer.weight.dtype)
    with without_autocast(indices.device.type):  # as the look-up itself
        x = dropped(F.embedding(indices, core if rows_factor is None else rows_factor), delta)
        x = x if rows_factor is None else x @ core
        y = x if widen is None else F.linear(x, widen)
        if layer.padding_idx is None:
            return y
        return y * (indices != layer.padding_idx).unsqueeze(-1)


# Convolutions -----------------------------------------------------------------------------------


def _conv_merged(layer: Conv, args: tuple[Any, ...], total: Total) -> Tensor:
    x, unbatched = _batched(layer, args[0])
    x, padding = _padded(layer, x)
    zeros = [0] * len(layer.kernel_size)
    geometry = (list(layer.stride), padding, list(layer.dilation), False, zeros, layer.groups)
    y = merged_conv(x, layer.weight, total, layer.bias, geometry)
    return y.squeeze(0) if unbatched else y


def _conv_side(layer: Conv, args: tuple[Any, ...], delta: Delta) -> Tensor:
    x, unbatched = _batched(layer, args[0])
    core, (widen, narrow, *kernel) = _tucker(delta, compute_dtype(x))
    core = expand(core, [None, None, *kernel])
    conv = _FUNCTIONS[len(kernel)]
    x = dropped(x, delta)
    if narrow is not None and tuple(layer.stride) == tuple(layer.kernel_size):
        core = mode_product(core, narrow, 1)  # patches: one thin conv reads each pixel once
    elif narrow is not None:
        x = conv(x, _pointwise(_repeat(narrow.T, layer.groups), kernel), groups=layer.groups)
    # A pointwise map without bias commutes with any padding, so the thin tensor is padded.
    x, padding = _padded(layer, x)
    kernels = core if widen is None else _repeat(core, layer.groups)
    y = conv(x, kernels, None, layer.stride, padding, layer.dilation, layer.groups)
    if widen is not None:
        y = conv(y, _pointwise(widen, kernel), groups=layer.groups)
    return y.squeeze(0) if unbatched else y


def _transposed_merged(layer: Transposed, args: tuple[Any, ...], total: Total) -> Tensor:
    x, unbatched = _batched(layer, args[0])
    geometry = (
        list(layer.stride),
        list(layer.padding),
        list(layer.dilation),
        True,
        _output_padding(layer, args),
        layer.groups,
    )
    y = merged_conv(x, layer.weight, total, layer.bias, geometry)
    return y.squeeze(0) if unbatched else y


def _transposed_side(layer: Transposed, args: tuple[Any, ...], delta: Delta) -> Tensor:
    x, unbatched = _batched(layer, args[0])
    core, (narrow, widen, *kernel) = _tucker(delta, compute_dtype(x))
    core = expand(core, [None, None, *kernel])
    n, groups = len(kernel), layer.groups
    x = dropped(x, delta)
    if narrow is not None:  # [in, r] holds one [in / groups, r] map for each group
        by_group = narrow.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        x = _FUNCTIONS[n](x, _pointwise(by_group, kernel), groups=groups)
        core = _repeat(core, groups)
    y = _TRANSPOSED_FUNCTIONS[n](
        x,
        core,
        None,
        layer.stride,
        layer.padding,
        _output_padding(layer, args),
        groups,
        layer.dilation,
    )
    if widen is not None:
        y = _FUNCTIONS[n](y, _pointwise(_repeat(widen, groups), kernel), groups=groups)
    return y.squeeze(0) if unbatched else y


_FUNCTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED_FUNCTIONS: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def _tucker(delta: Delta, dtype: torch.dtype) -> tuple[Tensor, list[Tensor | None]]:
    """The core and factors in the type of the computation.

    The small factors are cast, never the input: that would keep a second copy of it.
    """
    form = delta.tucker()
    assert form is not None
    core, factors = form
    return core.to(dtype), [None if factor is None else factor.to(dtype) for factor in factors]


def _batched(layer: Conv | Transposed, x: Tensor) -> tuple[Tensor, bool]:
    unbatched = x.dim() == len(layer.kernel_size) + 1
    return (x.unsqueeze(0) if unbatched else x), unbatched


def _padded(layer: Conv, x: Tensor) -> tuple[Tensor, list[int]]:
    """Pads by the layer's mode, and returns what padding is left to the convolution itself."""
    if layer.padding_mode != "zeros":
        return F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode), [0] * (
            x.dim() - 2
        )
    if not isinstance(layer.padding, str):
        return x, list(layer.padding)
    if layer.padding == "valid":
        return x, [0] * (x.dim() - 2)
    # "same" pads an even kernel by one more at the far end, which the convolution cannot.
    totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if any(total % 2 for total in totals):
        x = F.pad(x, [side for total in reversed(totals) for side in (0, total % 2)])
    return x, [total // 2 for total in totals]


def _output_padding(layer: Transposed, args: tuple[Any, ...]) -> list[int]:
    size = args[1] if len(args) > 1 else None
    stride, kernel, dilation = list(layer.stride), list(layer.kernel_size), list(layer.dilation)
    padding = [int(side) for side in layer.padding]
    return layer._output_padding(args[0], size, stride, padding, kernel, len(kernel), dilation)


def _pointwise(matrix: Tensor, kernel: list[Any]) -> Tensor:
    return matrix.reshape(*matrix.shape, *[1] * len(kernel))


def _repeat(kernel: Tensor, groups: int) -> Tensor:
    return kernel if groups == 1 else kernel.repeat(groups, *[1] * (kernel.dim() - 1))


_OPS: dict[type[nn.Module], Op] = {
    nn.Linear: Op(_linear_merged, _linear_side),
    nn.Embedding: Op(_embedding_merged, _embedding_side),
    **{cls: Op(_conv_merged, _conv_side) for cls in CONVS},
    **{cls: Op(_transposed_merged, _transposed_side) for cls in TRANSPOSED},
}
_CONV1D = Op(_conv1d_merged, _conv1d_side)

"""How ``op(x, W + dW)`` is computed: the merged path, and the rule that chooses a path.

side    the layer's own operation, and beside it the low-rank chain of dW
merged  one operation with ``W + dW``, which is built again in backward and never kept

Both are exact; they differ in time and memory alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta import Delta

# Below this ratio of the layer's own work to the side chain's, the chain costs more than the
# whole weight gradient that it avoids: its rank-r products are bound by memory traffic.
NARROW = 5.0


class Total:
    """The weighted sum of the deltas that are active on one weight."""

    def __init__(self, terms: Sequence[tuple[Delta, float]]) -> None:
        self.terms = list(terms)

    def tensors(self) -> tuple[Tensor, ...]:
        """The factors of every term, in the order that calling takes them."""
        return tuple(tensor for delta, _ in self.terms for tensor in delta.tensors())

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The summed dW, made from ``tensors``, in the factors' own precision."""
        total: Tensor | None = None
        start = 0
        with without_autocast(tensors[0].device.type):
            for delta, weight in self.terms:
                stop = start + len(delta.tensors())
                dense = delta.compose(*tensors[start:stop])
                dense = dense if weight == 1.0 else weight * dense
                total = dense if total is None else total + dense
                start = stop
        assert total is not None
        return total


def choose(delta: Delta, rows: int, weight: Tensor, training: bool) -> str:
    """Which path a delta takes: its own choice, or for "auto" the first line that holds.

    ============================================  =======  ====================================
    the delta has no low-rank chain               merged   nothing else is possible
    dropout, in training                          side     it acts on the chain's input
    the weight is stored in half precision        side     bf16(W + dW) loses most of a small dW
    embedding                                     side     a look-up in the factor is all it takes
    depthwise                                     merged   the chain has r times the base's work
    few channels, and rows to pay for building W  merged   see `NARROW`
    everything else                               side
    ============================================  =======  ====================================

    Args:
        delta: The delta.
        rows: Positions that the layer maps: tokens, or pixels of a convolution.
        weight: The base weight.
        training: Whether the layer is in training mode.
    """
    delta = next(leaf for _, leaf in delta.leaves() if leaf is not None)
    form = delta.tucker()
    if form is None or not delta.info.has_side:
        return "merged"
    if delta.path != "auto":
        return delta.path
    if (delta.dropout > 0 and training) or weight.dtype in (torch.float16, torch.bfloat16):
        return "side"
    if delta.info.kind == "embedding":
        return "side"
    if delta.info.kind == "depthwise":
        return "merged"
    return "merged" if _is_narrow(delta, form[0], rows) else "side"


def _is_narrow(delta: Delta, core: Tensor, rows: int) -> bool:
    info = delta.info
    fan_in, fan_out = info.shape[info.in_dim], info.shape[info.out_dim]
    rank = min(core.shape[info.in_dim], core.shape[info.out_dim])
    own, chain = fan_in * fan_out, rank * (fan_in + fan_out)
    return own <= NARROW * 2 * chain and rows * (fan_in + fan_out) >= own


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context in which nothing is cast; devices such as "meta" know no autocast."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that a matrix product with ``x`` runs in, autocast considered."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)


def merged_linear(x: Tensor, weight: Tensor, total: Total, bias: Tensor | None) -> Tensor:
    """``x (W + dW)^T + b`` for ``W`` of shape ``[out, in]``."""
    return _apply(_MergedLinear, x, weight, total, bias)


def merged_conv(
    x: Tensor, weight: Tensor, total: Total, bias: Tensor | None, geometry: tuple[Any, ...]
) -> Tensor:
    """A convolution with ``W + dW``.

    Args:
        x: Batched, padded input.
        weight: The base kernel.
        total: Makes dW.
        bias: The base bias.
        geometry: Stride, padding, dilation, transposed, output padding and groups, as
            ``torch.ops.aten.convolution`` takes them.
    """
    return _apply(_MergedConv, x, weight, total, bias, geometry)


def _apply(
    function: type[torch.autograd.Function],
    x: Tensor,
    weight: Tensor,
    total: Total,
    bias: Tensor | None,
    *geometry: Any,
) -> Tensor:
    dtype = compute_dtype(x)
    cast = dtype != x.dtype or torch.is_autocast_enabled(x.device.type)
    if not x.is_floating_point() or (dtype != weight.dtype and not cast):
        raise RuntimeError(f"the layer's weight is {weight.dtype}, and its input {x.dtype}")
    bias = None if bias is None else bias.to(dtype)
    tensors = total.tensors()
    # dW is an input so that autograd carries its gradient on to the factors; the factors are
    # inputs so that dW can be built again without being kept, and changed factors be noticed.
    return function.apply(x.to(dtype), weight, total(*tensors), bias, total, *geometry, *tensors)


def _added(weight: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight + delta).to(dtype)


def _save(
    ctx: Any, inputs: tuple[Any, ...], total: Callable[..., Tensor], tensors: tuple[Tensor, ...]
) -> None:
    x, weight, delta, _ = inputs[:4]
    ctx.total, ctx.delta_dtype = total, delta.dtype
    wants_weight = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if wants_weight else None, weight, *tensors)


class _MergedLinear(torch.autograd.Function):
    """The linear map with ``W + dW``, built again in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, total: Any, *tensors: Tensor
    ) -> Tensor:
        return F.linear(x, _added(weight, delta, x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs, inputs[4], inputs[5:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gy,) = grads
        x, weight, *tensors = ctx.saved_tensors
        wants = ctx.needs_input_grad
        gx = gw = gb = None
        rows = gy.reshape(-1, gy.shape[-1])
        if wants[0]:
            gx = gy @ _added(weight, ctx.total(*tensors), gy.dtype)
        if x is not None:
            gw = (rows.T @ x.reshape(-1, x.shape[-1])).to(ctx.delta_dtype)
        if wants[3]:
            gb = rows.sum(0)
        return gx, gw if wants[1] else None, gw, gb, None, *[None] * len(tensors)


class _MergedConv(torch.autograd.Function):
    """The convolution with ``W + dW``, built again in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        delta: Tensor,
        bias: Tensor | None,
        total: Any,
        geometry: tuple[Any, ...],
        *tensors: Tensor,
    ) -> Tensor:
        return torch.ops.aten.convolution(x, _added(weight, delta, x.dtype), bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs, inputs[4], inputs[6:])
        ctx.geometry = inputs[5]
        ctx.input_shape = inputs[0].shape
        ctx.bias_sizes = None if inputs[3] is None else list(inputs[3].shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gy,) = grads
        x, weight, *tensors = ctx.saved_tensors
        wants = ctx.needs_input_grad
        mask = [wants[0], x is not None, wants[3]]
        # The input gradient reads the kernel alone and the kernel gradient the input alone.
        kernel = _added(weight, ctx.total(*tensors), gy.dtype) if wants[0] else weight.to(gy.dtype)
        x = gy.new_empty(1).expand(ctx.input_shape) if x is None else x
        gx, gw, gb = torch.ops.aten.convolution_backward(
            gy, x, kernel, ctx.bias_sizes, *ctx.geometry, mask
        )
        gw = None if gw is None else gw.to(ctx.delta_dtype)
        return gx, gw if wants[1] else None, gw, gb, None, None, *[None] * len(tensors)

"""The autograd functions of an adapted layer: its own map, with W + dW in the place of W.

Thin      dW = B A, with few rows in A: the gradients of B and A are formed without that of W
Merged    any dW, through the gradient of the whole weight

Both save the layer's input and small tensors, never W + dW, which they build again in backward;
of an input that a norm or an activation made they save what it was made from (see `recompute`).
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dropout import Dropout
from .forms import Form
from .maps import Map
from .recompute import Recipe
from .thin import added


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context in which nothing is cast; devices such as "meta" know no autocast."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that a matrix product with ``x`` runs in, autocast considered."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x.dtype
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)


@dataclass(frozen=True)
class Step:
    """What a function needs besides tensors.

    Attributes:
        map: The layer's own map.
        form: How the layer's tensors become those of the map.
        out_dim: The mode of the weight that indexes outputs.
        rebuild: Compute with W + dW; otherwise B A runs beside W.
        recipe: Makes the input from its source; None where the input itself is saved.
        dropout: The dropout on the chain's input, if there is one.
    """

    map: Map
    form: Form
    out_dim: int = 0
    rebuild: bool = False
    recipe: Recipe | None = None
    dropout: Dropout | None = None

    def input(self, saved: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer's input, from what was saved of it."""
        return saved if self.recipe is None else self.recipe(saved).to(dtype)

    def thin(self, narrow: Tensor, dtype: torch.dtype) -> Tensor:
        """A, made larger by the share of inputs that dropout takes away."""
        narrow = narrow.to(dtype)
        return narrow if self.dropout is None else self.dropout.amplified(narrow)

    def kernel(self, weight: Tensor, widen: Tensor, narrow: Tensor, x: Tensor) -> Tensor:
        """W, or W + dW made in the precision of the factors, for an input like ``x``."""
        if not self.rebuild:
            return weight.to(x.dtype)
        with without_autocast(weight.device.type):
            return added(weight, widen, narrow, self.out_dim, x).to(x.dtype)


class Thin(torch.autograd.Function):
    """The map with ``W + B A``; A runs as a map of few outputs, B mixes these."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        source: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        widen: Tensor,
        narrow: Tensor,
        step: Step,
    ) -> Tensor:
        """The output."""
        form = step.form
        x, weight, narrow = form.input(x), form.weight(weight), form.weight(narrow)
        y = step.map(x, step.kernel(weight, widen, narrow, x), bias)
        if not step.rebuild:
            thin = step.thin(narrow, x.dtype)
            if step.dropout is None:
                hidden = step.map.hidden(x, thin)
            else:
                hidden = step.dropout.hidden(step.map, x, thin)
            y = step.map.plus_widened(y, hidden, widen.to(x.dtype))
        return _no_view(form.output(y))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves what backward needs."""
        x, source, weight, _, widen, narrow, step = inputs
        ctx.step, ctx.shape = step, _shape(x)
        kept = x if source is None else source
        wanted = step.dropout is not None or any(ctx.needs_input_grad[i] for i in (2, 4, 5))
        ctx.save_for_backward(kept if wanted else None, weight, widen, narrow)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients of what forward took."""
        (gy,) = grads
        with without_autocast(gy.device.type):  # backward may be called inside, after all
            return _thin_grads(ctx, gy)


# torch finds the signature at each call and binds the arguments to it: to one this is quick.
_INPUTS = inspect.Signature([inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)])
Thin.forward.__signature__ = _INPUTS  # type: ignore[attr-defined]


def _thin_grads(ctx: Any, gy: Tensor) -> Any:
    saved, weight, widen, narrow = ctx.saved_tensors
    step: Step = ctx.step
    wants, maps, form = ctx.needs_input_grad, step.map, step.form
    shapes, types = (weight.shape, narrow.shape), (weight.dtype, widen.dtype, narrow.dtype)
    gy, weight, narrow = form.output_grad(gy), form.weight(weight), form.weight(narrow)
    wide, thin = widen.to(gy.dtype), step.thin(narrow, gy.dtype)
    x = None if saved is None else form.input(step.input(saved, gy.dtype))
    gx = gw = gb = g_widen = g_narrow = hidden = None
    if wants[0]:
        like = maps.stand_in(gy, ctx.shape) if x is None else x
        kernel = step.kernel(weight, widen, narrow, like)
        gx, g_hidden = maps.input_and_hidden_grad(gy, kernel, wide, like)
        if not step.rebuild and step.dropout is None:
            gx = maps.plus_input_grad(gx, g_hidden, thin)
    else:
        g_hidden = maps.hidden_grad(gy, wide)
    if step.dropout is not None and x is not None:
        gx, hidden, g_narrow = step.dropout.chain_grads(maps, gx, g_hidden, thin, x)
        g_narrow = step.dropout.amplified(g_narrow)
    elif x is not None and (wants[4] or wants[5]):
        hidden = maps.hidden(x, thin)
        g_narrow = maps.narrow_grad(g_hidden, x, narrow.shape)
    if hidden is not None and g_narrow is not None:
        g_widen = maps.widen_grad(gy, hidden).to(types[1])
        g_narrow = form.weight_grad(g_narrow, shapes[1]).to(types[2])
    if x is not None and wants[2]:
        gw = form.weight_grad(maps.weight_grad(gy, x, weight.shape), shapes[0]).to(types[0])
    if wants[3]:
        gb = maps.bias_grad(gy)
    gx = None if gx is None else form.input_grad(gx, ctx.shape)
    return gx, None, gw, gb, g_widen, g_narrow, None


class Merged(torch.autograd.Function):
    """The map with ``W + dW`` for any dW, which autograd gets the whole weight's gradient of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        source: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        delta: Tensor,
        make: Any,
        step: Step,
        *tensors: Tensor,
    ) -> Tensor:
        """The output."""
        form, kernel = step.form, (weight + delta).to(x.dtype)
        return _no_view(form.output(step.map(form.input(x), form.weight(kernel), bias)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves what backward needs."""
        x, source, weight, _, delta, make, step, *tensors = inputs
        ctx.step, ctx.make, ctx.delta_dtype = step, make, delta.dtype
        ctx.scales = make.scales()
        ctx.shape = _shape(x)
        kept = x if source is None else source
        wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[4]
        ctx.save_for_backward(kept if wanted else None, weight, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients of what forward took."""
        (gy,) = grads
        with without_autocast(gy.device.type):
            return _merged_grads(ctx, gy)


Merged.forward.__signature__ = _INPUTS  # type: ignore[attr-defined]


def _merged_grads(ctx: Any, gy: Tensor) -> Any:
    ctx.make.check(ctx.scales)
    saved, weight, *tensors = ctx.saved_tensors
    step: Step = ctx.step
    wants, maps, form = ctx.needs_input_grad, step.map, step.form
    gy, gx, gw, gb = form.output_grad(gy), None, None, None
    kernel = form.weight((weight + ctx.make(*tensors)).to(gy.dtype)) if wants[0] else None
    x = None if saved is None else form.input(step.input(saved, gy.dtype))
    if kernel is not None and x is not None:
        gx, gw = maps.grads(gy, kernel, x)
    elif kernel is not None:
        gx = maps.input_grad(gy, kernel, maps.stand_in(gy, ctx.shape))
    elif x is not None:
        gw = maps.weight_grad(gy, x, weight.shape)
    gx = None if gx is None else form.input_grad(gx, ctx.shape)
    gw = None if gw is None else form.weight_grad(gw, weight.shape).to(ctx.delta_dtype)
    if wants[3]:
        gb = maps.bias_grad(gy)
    return gx, None, gw if wants[2] else None, gb, gw, None, None, *[None] * len(tensors)


def _no_view(y: Tensor) -> Tensor:
    """An output that may be written into, as ``nn.ReLU(inplace=True)`` does."""
    if torch.compiler.is_compiling() or not y._is_view():  # the compiler sees to it itself
        return y
    return y.data


def _shape(x: Tensor) -> torch.Size:
    return torch.Size() if x.is_nested else x.shape  # which have none, and no backward here either

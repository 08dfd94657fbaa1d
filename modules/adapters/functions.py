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

from .maps import Map, plus
from .recompute import Recipe


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
        out_dim: The mode of the weight that indexes outputs.
        rebuild: Compute with W + dW; otherwise B A runs beside W.
        recipe: Makes the input from its source; None where the input itself is saved.
        dropout: Probability of dropping an input of the chain.
        seed: Seed of the dropout, from which backward draws the same mask.
    """

    map: Map
    out_dim: int = 0
    rebuild: bool = False
    recipe: Recipe | None = None
    dropout: float = 0.0
    seed: int = 0

    def input(self, saved: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer's input, from what was saved of it."""
        return saved if self.recipe is None else self.recipe(saved).to(dtype)

    def kernel(self, weight: Tensor, widen: Tensor, narrow: Tensor, x: Tensor) -> Tensor:
        """W, or W + dW made in the precision of the factors, for an input like ``x``."""
        if not self.rebuild:
            return weight.to(x.dtype)
        wide = torch.promote_types(weight.dtype, widen.dtype)
        widen, narrow = widen.to(wide), narrow.to(wide)
        with without_autocast(weight.device.type):
            if self.out_dim != 0:
                dense = torch.tensordot(widen, narrow, dims=([1], [self.out_dim]))
                return (weight + dense.movedim(0, self.out_dim)).to(x.dtype)
            if not self.map.wants_channels_last(x):
                dense = (widen @ narrow.flatten(1)).view(weight.shape)
                added = plus(dense, weight) if weight.is_contiguous() else weight + dense
                return added.to(x.dtype)  # laid out as the weight is
            last = weight.movedim(1, -1)  # one pass lays W out, too, which torch would do after it
            dense = widen @ narrow.movedim(1, -1).flatten(1)
            return plus(dense.view(last.shape), last).movedim(-1, 1).to(x.dtype)

    def keep(self, x: Tensor) -> Tensor | None:
        """What dropout leaves of an input, as ones and zeros; None without dropout."""
        if self.dropout == 0.0:
            return None
        generator = torch.Generator(x.device).manual_seed(self.seed)
        # Sixteen random bits for each element: drawing a float for each takes four times as long.
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
        bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)
        return (bits[: x.numel()].view(x.shape) >= self._dropped - 2**15).to(x.dtype)

    def amplified(self, thin: Tensor) -> Tensor:
        """A thin tensor times 1 / (1 - p), which makes up for the inputs that are dropped."""
        return thin / (1 - self._dropped / 2**16) if self.dropout else thin

    @property
    def _dropped(self) -> int:
        """How many of 65,536 inputs are dropped."""
        return min(round(self.dropout * 2**16), 2**16 - 1)


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
        x = step.map.prepared(x)
        y = step.map(x, step.kernel(weight, widen, narrow, x), bias)
        if step.rebuild:
            return y
        hidden = step.map.hidden(_kept(x, step.keep(x)), step.amplified(narrow.to(x.dtype)))
        return step.map.plus_widened(y, hidden, widen.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves what backward needs."""
        x, source, weight, _, widen, narrow, step = inputs
        ctx.step, ctx.shape = step, _shape(x)
        kept = x if source is None else source
        wanted = step.dropout > 0 or any(ctx.needs_input_grad[i] for i in (2, 4, 5))
        ctx.save_for_backward(kept if wanted else None, weight, widen, narrow)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients of what forward took."""
        (gy,) = grads
        with without_autocast(gy.device.type):  # backward may be called inside, after all
            return _thin_grads(ctx, gy)


def _thin_grads(ctx: Any, gy: Tensor) -> Any:
    saved, weight, widen, narrow = ctx.saved_tensors
    step: Step = ctx.step
    wants, maps = ctx.needs_input_grad, step.map
    wide, thin = widen.to(gy.dtype), step.amplified(narrow.to(gy.dtype))
    g_hidden = maps.hidden_grad(gy, wide)
    x = None if saved is None else maps.prepared(step.input(saved, gy.dtype))
    keep = None if x is None else step.keep(x)
    gx = gw = gb = g_widen = g_narrow = None
    if wants[0]:
        like = maps.stand_in(gy, ctx.shape) if x is None else x
        gx = maps.input_grad(gy, step.kernel(weight, widen, narrow, like), like)
        if keep is not None:
            gx = plus(gx, _kept(maps.narrowed_grad(g_hidden, thin, like), keep))
        elif not step.rebuild:
            gx = maps.plus_input_grad(gx, g_hidden, thin)
        gx = maps.restored(gx, ctx.shape)
    if x is not None and wants[2]:
        gw = maps.weight_grad(gy, x, weight.shape).to(weight.dtype)
    if x is not None and (wants[4] or wants[5]):
        x = _kept(x, keep)
        g_narrow = maps.narrow_grad(step.amplified(g_hidden), x, narrow.shape).to(narrow.dtype)
        g_widen = maps.widen_grad(gy, maps.hidden(x, thin)).to(widen.dtype)
    if wants[3]:
        gb = maps.bias_grad(gy)
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
        return step.map(step.map.prepared(x), (weight + delta).to(x.dtype), bias)

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


def _merged_grads(ctx: Any, gy: Tensor) -> Any:
    ctx.make.check(ctx.scales)
    saved, weight, *tensors = ctx.saved_tensors
    step: Step = ctx.step
    wants = ctx.needs_input_grad
    gx = gw = gb = None
    kernel = (weight + ctx.make(*tensors)).to(gy.dtype) if wants[0] else None
    maps = step.map
    x = None if saved is None else maps.prepared(step.input(saved, gy.dtype))
    if kernel is not None and x is not None:
        gx, gw = maps.grads(gy, kernel, x)
    elif kernel is not None:
        gx = maps.input_grad(gy, kernel, maps.stand_in(gy, ctx.shape))
    elif x is not None:
        gw = maps.weight_grad(gy, x, weight.shape)
    gx = None if gx is None else maps.restored(gx, ctx.shape)
    gw = None if gw is None else gw.to(ctx.delta_dtype)
    if wants[3]:
        gb = step.map.bias_grad(gy)
    return gx, None, gw if wants[2] else None, gb, gw, None, None, *[None] * len(tensors)


# torch binds the arguments of every call to the signature, which takes longer to find than to use.
for _function in (Thin, Merged):
    vars(_function)["forward"].__func__.__signature__ = inspect.signature(_function.forward)


def _shape(x: Tensor) -> torch.Size:
    return torch.Size() if x.is_nested else x.shape  # which have none, and no backward here either


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep

"""The layer types whose computation is known, and how each runs with ``W + dW``.

A layer type that is not here (attention, a custom forward, a raw parameter) runs its own forward
with the weight put in its place (see `layers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .delta import Delta
from .dropout import Dropout
from .forms import Form, Patches, takes_patches
from .functions import Merged, Step, Thin, compute_dtype, without_autocast
from .maps import ConvMap, LinearMap, Map
from .recompute import source_of
from .thin import thin
from .total import Total

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def op_of(cls: type[nn.Module]) -> Op | None:
    """How a layer class computes, or None if its forward is not one that is known here."""
    for base, op in _OPS.items():
        if issubclass(cls, base) and cls.forward is base.forward and _same_conv(cls, base):
            return op
    return _conv1d if is_conv1d(cls) else None


def is_conv1d(cls: type) -> bool:
    """Whether ``cls`` is transformers' Conv1D, a linear layer that stores ``[in, out]``."""
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def _same_conv(cls: type, base: type) -> bool:
    return getattr(cls, "_conv_forward", None) is getattr(base, "_conv_forward", None)


def rows(layer: nn.Module, x: Tensor, delta: Delta) -> int:
    """Positions that the layer maps: those of the output, but of the input if transposed."""
    if delta.info.kind == "embedding":
        return x.numel()
    channels = delta.info.shape[delta.info.in_dim]
    if delta.info.out_dim == 0:
        channels *= delta.info.groups
    return x.numel() // max(1, channels * math.prod(stride(layer)))


def stride(layer: nn.Module) -> tuple[int, ...]:
    """The stride of a convolution; empty for all others."""
    return tuple(layer.stride) if isinstance(layer, CONVS) else ()


# Linear maps and convolutions ---------------------------------------------------------------------


@dataclass(frozen=True)
class MapCall:
    """One call of a layer that is a map.

    Attributes:
        map: The map.
        form: How the layer's tensors become those of the map.
        x: The layer's input, batched and padded.
        weight: The weight as the map takes it.
        bias: The bias.
        out_dim: The mode of that weight which indexes outputs.
        swapped: Whether the layer stores the weight the other way round.
        unbatched: Whether the layer was given one sample without a batch.
    """

    map: Map
    form: Form
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    out_dim: int = 0
    swapped: bool = False
    unbatched: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type that the map computes in.

        Raises:
            RuntimeError: It is not the weight's, and autocast is off.
        """
        dtype = compute_dtype(self.x)
        cast = dtype != self.x.dtype or torch.is_autocast_enabled(self.x.device.type)
        if not self.x.is_floating_point() or (dtype != self.weight.dtype and not cast):
            raise RuntimeError(
                f"the layer's weight is {self.weight.dtype}, and its input {self.x.dtype}"
            )
        return dtype

    def with_weight(self, weight: Tensor) -> Tensor:
        """The map with another weight, in the layout and type that are stored and computed in."""
        dtype, form = self.dtype, self.form
        bias = None if self.bias is None else self.bias.to(dtype)
        kernel = form.weight(weight.T if self.swapped else weight)
        y = form.output(self.map(form.input(self.x.to(dtype)), kernel, bias))
        return y.squeeze(0) if self.unbatched else y

    def with_delta(self, total: Total, path: str) -> Tensor:
        """The map with ``W + dW``, on one of the paths."""
        y = self._on_path(total, path)
        return y.squeeze(0) if self.unbatched else y

    def _on_path(self, total: Total, path: str) -> Tensor:
        dtype = self.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        again = all(delta.recompute for delta, _ in total.terms)
        recipe, source = source_of(self.x) if again else (None, None)
        step = Step(self.map, self.form, self.out_dim, path == "rebuilt", recipe)
        tensors: tuple[Tensor | None, ...] = (self.x.to(dtype), source, self.weight, bias)
        if path == "merged":
            return self._merged(tensors, total, step)
        dropout = {_dropout(delta) for delta, _ in total.terms} - {0.0}
        if not dropout:
            return self._thin(tensors, total, step)
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if len(total.terms) > 1 or traced or self.x.is_meta:
            return self._beside(total)
        seed = int(torch.randint(2**62, (), device="cpu"))
        return self._thin(tensors, total, replace(step, dropout=Dropout(dropout.pop(), seed)))

    def _merged(self, tensors: tuple[Tensor | None, ...], total: Total, step: Step) -> Tensor:
        make = _Swapped(total.terms) if self.swapped else total
        factors = total.tensors()
        if torch.compiler.is_compiling():  # which takes no tensor twice, such as the weight of DoRA
            factors = tuple(factor.view_as(factor) for factor in factors)
        # dW is an input so that autograd carries its gradient on to the factors; the factors are
        # inputs so that dW can be built again, and factors that were changed be noticed.
        y: Tensor = Merged.apply(*tensors, make(*factors), make, step, *factors)
        return y

    def _thin(self, tensors: tuple[Tensor | None, ...], total: Total, step: Step) -> Tensor:
        y: Tensor = Thin.apply(*tensors, *self._factors(total.terms), step)
        return y

    def _beside(self, total: Total) -> Tensor:
        """Every delta as a chain of torch's own operations, with a dropout of its own."""
        form, bias = self.form, None if self.bias is None else self.bias.to(self.dtype)
        x = form.input(self.x.to(self.dtype))
        y = self.map(x, form.weight(self.weight.to(self.dtype)), bias)
        for delta, share in total.terms:
            widen, narrow = (t.to(self.dtype) for t in self._factors([(delta, share)]))
            hidden = self.map.hidden(F.dropout(x, _dropout(delta)), form.weight(narrow))
            y = self.map.plus_widened(y, hidden, widen)
        return form.output(y)

    def _factors(self, terms: list[tuple[Delta, float]]) -> tuple[Tensor, Tensor]:
        with without_autocast(self.x.device.type):
            widen, narrow = thin(terms)
        if self.swapped:
            return widen, narrow.T
        if isinstance(self.map, ConvMap) and self.map.groups > 1:  # every group has the same A
            if self.map.transposed:  # whose weight has the inputs of all groups already
                return _repeat(widen, self.map.groups), narrow
            return widen, _repeat(narrow, self.map.groups)
        return widen, narrow


def _dropout(delta: Delta) -> float:
    return delta.dropout if delta.training else 0.0


class _Swapped(Total):
    """The sum of the deltas of a ``[in, out]`` weight, as ``[out, in]``."""

    def __call__(self, *tensors: Tensor) -> Tensor:
        return super().__call__(*tensors).T


def _linear(layer: nn.Linear, args: tuple[Any, ...]) -> MapCall:
    return MapCall(LinearMap(), Form(), args[0], layer.weight, layer.bias)


def _conv1d(layer: Any, args: tuple[Any, ...]) -> MapCall:
    return MapCall(LinearMap(), Form(), args[0], layer.weight.T, layer.bias, swapped=True)


def _conv(layer: Conv, args: tuple[Any, ...]) -> MapCall:
    x, unbatched = _batched(layer, args[0])
    x, padding = _padded(layer, x)
    stride, dilation = list(layer.stride), list(layer.dilation)
    offsets = [*padding, *(step - 1 for step in dilation)]
    if takes_patches(x, layer.weight, stride, offsets, layer.groups):
        linear, form = LinearMap(), Patches(stride)
        return MapCall(linear, form, x, layer.weight, layer.bias, unbatched=unbatched)
    conv = ConvMap(stride, padding, dilation, False, [0] * len(stride), layer.groups)
    return MapCall(conv, Form(), x, layer.weight, layer.bias, unbatched=unbatched)


def _transposed(layer: Transposed, args: tuple[Any, ...]) -> MapCall:
    x, unbatched = _batched(layer, args[0])
    more, stride, dilation = _output_padding(layer, args), list(layer.stride), list(layer.dilation)
    padding = [int(side) for side in layer.padding]
    conv = ConvMap(stride, padding, dilation, True, more, layer.groups)
    return MapCall(conv, Form(), x, layer.weight, layer.bias, out_dim=1, unbatched=unbatched)


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


def _repeat(kernel: Tensor, groups: int) -> Tensor:
    return kernel.repeat(groups, *[1] * (kernel.dim() - 1))


# Embeddings ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LookUpCall:
    """One call of an embedding."""

    layer: nn.Embedding
    indices: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The type of the rows."""
        return self.layer.weight.dtype

    def with_weight(self, weight: Tensor) -> Tensor:
        """The look-up in another weight."""
        # Its backward keeps the indices alone, so W + dW is not kept here either.
        layer = self.layer
        return F.embedding(
            self.indices, weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq
        )

    def with_delta(self, total: Total, path: str) -> Tensor:
        """The look-up in ``W + dW``, or in W and in the factors."""
        weight = self.layer.weight
        if path == "merged":
            return self.with_weight((weight + total(*total.tensors())).to(weight.dtype))
        y = self.with_weight(weight)
        for delta, share in total.terms:
            slices = [
                y.new_zeros(*y.shape[:-1], size) if leaf is None else share * self._chain(leaf)
                for size, leaf in delta.leaves()
            ]
            y = y + torch.cat(slices, -1)
        return y

    def _chain(self, delta: Delta) -> Tensor:
        form = delta.tucker()
        assert form is not None
        core = form[0].to(self.dtype)
        rows_factor, widen = (None if f is None else f.to(self.dtype) for f in form[1])
        with without_autocast(self.indices.device.type):  # as the look-up itself
            x = F.embedding(self.indices, core if rows_factor is None else rows_factor)
            x = F.dropout(x, _dropout(delta))
            x = x if rows_factor is None else x @ core
            y = x if widen is None else F.linear(x, widen)
            if self.layer.padding_idx is not None:
                y = y * (self.indices != self.layer.padding_idx).unsqueeze(-1)
            return delta.scale * y


def _embedding(layer: nn.Embedding, args: tuple[Any, ...]) -> LookUpCall:
    return LookUpCall(layer, args[0])


# Describes one call of a layer from the layer and its arguments.
Op = Callable[[Any, tuple[Any, ...]], MapCall | LookUpCall]

_OPS: dict[type[nn.Module], Op] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    **dict.fromkeys(CONVS, _conv),
    **dict.fromkeys(TRANSPOSED, _transposed),
}

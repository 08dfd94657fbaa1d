"""Maps: linear layers and convolutions without their tensors, and what backward asks of them.

A map is linear in its input and in its weight. Beside the map itself and its gradients it has the
thin products of a chain ``x -> x A^T -> x A^T B^T``, with R rows in A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .depthwise import kernel_grad, takes_row_products

# From more inputs on, a product takes so long that reading its gradient twice does not show; with
# outputs less than twice as many, copying W and the input's gradient costs what is won. (On a CPU.)
FEW = 256


class LinearMap:
    """``y = x W^T`` on the last dimension, for W of shape ``[out, in]``.

    Products with a thin matrix have that matrix on the left: on a CPU this is twice to six times as
    fast as the other way round.
    """

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The map itself."""
        return F.linear(x, weight, bias)

    def stand_in(self, gy: Tensor, shape: torch.Size) -> Tensor:
        """What `input_grad` takes for the input where that is not at hand: anything."""
        return gy

    def input_grad(self, gy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """The gradient of the input."""
        # Of more than two dimensions, matmul may make a slower batched product.
        return (_rows(gy) @ weight).view(*gy.shape[:-1], weight.shape[1])

    def input_and_hidden_grad(
        self, gy: Tensor, weight: Tensor, widen: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`input_grad` and `hidden_grad`; of few inputs in one product, which reads ``gy`` once."""
        fan_out, fan_in = weight.shape
        if fan_in > FEW or fan_out < 2 * fan_in:
            return self.input_grad(gy, weight, x), self.hidden_grad(gy, widen)
        both = _rows(gy) @ torch.cat([weight, widen], 1)
        both = both.view(*gy.shape[:-1], fan_in + widen.shape[1])
        return both[..., :fan_in].contiguous(), both[..., fan_in:]

    def grads(self, gy: Tensor, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of input and weight."""
        return self.input_grad(gy, weight, x), self.weight_grad(gy, x, weight.shape)

    def weight_grad(self, gy: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the weight."""
        return _rows(gy).T @ _rows(x)

    def bias_grad(self, gy: Tensor) -> Tensor:
        """The gradient of the bias."""
        return _rows(gy).sum(0)

    def hidden(self, x: Tensor, narrow: Tensor) -> Tensor:
        """``x A^T`` for A of shape ``[R, in]``."""
        return (narrow @ _rows(x).T).T.reshape(*x.shape[:-1], len(narrow))

    def hidden_grad(self, gy: Tensor, widen: Tensor) -> Tensor:
        """``gy B``, the gradient of what `hidden` gives, for B of shape ``[out, R]``."""
        return self.hidden(gy, widen.T)

    def widen_grad(self, gy: Tensor, hidden: Tensor) -> Tensor:
        """The gradient of B."""
        return (_rows(hidden).T @ _rows(gy)).T

    def narrow_grad(self, g_hidden: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of A."""
        return _rows(g_hidden).T @ _rows(x)

    def plus_widened(self, y: Tensor, hidden: Tensor, widen: Tensor) -> Tensor:
        """``y + hidden B^T``; may write into ``y``."""
        if is_watched():
            return y + F.linear(hidden, widen)
        y.view(-1, y.shape[-1]).addmm_(_rows(hidden), widen.T)  # a reshape could be a copy
        return y

    def plus_input_grad(self, gx: Tensor, g_hidden: Tensor, narrow: Tensor) -> Tensor:
        """``gx + g_hidden A``; may write into ``gx``."""
        if is_watched():
            return gx + g_hidden @ narrow
        gx.view(-1, gx.shape[-1]).addmm_(_rows(g_hidden), narrow)
        return gx


@dataclass(frozen=True)
class ConvMap:
    """A convolution; the settings are those of ``torch.ops.aten.convolution``.

    Its chain is a convolution to R channels, or R for each group, and a pointwise one.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The map itself."""
        return torch.ops.aten.convolution(x, weight, bias, *self._geometry())

    def stand_in(self, gy: Tensor, shape: torch.Size) -> Tensor:
        """What `input_grad` takes for an input of this shape where that is not at hand."""
        return gy.new_empty(1).expand(shape)

    def input_grad(self, gy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """The gradient of the input, whose values are not read but its shape and layout are."""
        gradient: Tensor = self._backward(gy, x, weight, True, False)[0]
        return gradient

    def input_and_hidden_grad(
        self, gy: Tensor, weight: Tensor, widen: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`input_grad` and `hidden_grad`."""
        return self.input_grad(gy, weight, x), self.hidden_grad(gy, widen)

    def weight_grad(self, gy: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of a weight of this shape."""
        if self._is_small_depthwise(gy, x):
            return kernel_grad(gy, x, shape, self.padding)
        like = gy.new_empty(1).expand(shape)  # it reads the input alone
        gradient: Tensor = self._backward(gy, x, like, False, True)[1]
        return gradient

    def grads(self, gy: Tensor, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of input and weight."""
        if self._is_small_depthwise(gy, x):
            return self.input_grad(gy, weight, x), self.weight_grad(gy, x, weight.shape)
        gx, gw, _ = self._backward(gy, x, weight, True, True)
        return gx, gw

    def bias_grad(self, gy: Tensor) -> Tensor:
        """The gradient of the bias."""
        return gy.sum([0, *range(2, gy.dim())])

    def hidden(self, x: Tensor, narrow: Tensor) -> Tensor:
        """The convolution with A, of the shape of the kernel with R in the place of its outputs."""
        return self(x, narrow)

    def hidden_grad(self, gy: Tensor, widen: Tensor) -> Tensor:
        """The gradient of what `hidden` gives, for B of shape ``[out, R]``."""
        if self._has_rows(gy):
            rows = LinearMap().hidden(gy.movedim(1, -1), widen.T)
            return _like(rows.movedim(-1, 1), gy)
        shape = torch.Size((len(gy), widen.shape[1] * self.groups, *gy.shape[2:]))
        stand_in = gy.new_empty(1).expand(shape)
        return self._point().input_grad(gy, self._kernel(widen), stand_in)

    def widen_grad(self, gy: Tensor, hidden: Tensor) -> Tensor:
        """The gradient of B."""
        if self._has_rows(gy):
            return LinearMap().widen_grad(gy.movedim(1, -1), hidden.movedim(1, -1))
        shape = (gy.shape[1], hidden.shape[1] // self.groups)
        kernel = torch.Size((*shape, *[1] * len(self.stride)))
        return self._point().weight_grad(gy, hidden, kernel).reshape(shape)

    def narrow_grad(self, g_hidden: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of A."""
        return self.weight_grad(g_hidden, x, shape)

    def plus_widened(self, y: Tensor, hidden: Tensor, widen: Tensor) -> Tensor:
        """``y`` plus the pointwise convolution of ``hidden`` with B; may write into ``y``."""
        if self._has_rows(y):
            rows, hidden = y.movedim(1, -1), hidden.movedim(1, -1)
            both = LinearMap().plus_widened(rows, hidden, widen)
            return y if both is rows else both.movedim(-1, 1)  # written into, y is no view
        return plus(y, self._point()(hidden, self._kernel(widen)))

    def plus_input_grad(self, gx: Tensor, g_hidden: Tensor, narrow: Tensor) -> Tensor:
        """``gx`` plus what comes through A; may write into ``gx``."""
        return plus(gx, self.input_grad(g_hidden, narrow, gx))

    def _has_rows(self, y: Tensor) -> bool:
        """Whether pixels lie in memory one after the other, as the rows of a linear map do."""
        return self.groups == 1 and y.movedim(1, -1).is_contiguous()

    def _is_small_depthwise(self, gy: Tensor, x: Tensor) -> bool:
        if self.transposed or is_watched() or torch.compiler.is_compiling():
            return False
        return takes_row_products(gy, x, self.stride, self.dilation, self.groups)

    def _point(self) -> ConvMap:
        n = len(self.stride)
        return ConvMap([1] * n, [0] * n, [1] * n, False, [0] * n, self.groups)

    def _kernel(self, widen: Tensor) -> Tensor:
        return widen.reshape(*widen.shape, *[1] * len(self.stride))

    def _backward(self, gy: Tensor, x: Tensor, weight: Tensor, *wants: bool) -> Any:
        return torch.ops.aten.convolution_backward(
            gy, x, weight, None, *self._geometry(), [*wants, False]
        )

    def _geometry(self) -> tuple[Any, ...]:
        return (
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )


Map = LinearMap | ConvMap


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _like(x: Tensor, other: Tensor) -> Tensor:
    """``x`` in the memory layout of an image in channels_last, if ``other`` is one."""
    return x.contiguous(memory_format=torch.channels_last) if is_channels_last(other) else x


def plus(y: Tensor, term: Tensor) -> Tensor:
    """``y + term``; may write into ``y``."""
    return y + term if is_watched() else y.add_(term)


def times(y: Tensor, factor: Tensor) -> Tensor:
    """``y * factor``; may write into ``y``."""
    return y * factor if is_watched() else y.mul_(factor)


def is_channels_last(x: Tensor) -> bool:
    """Whether an image's pixels lie with their channels together; transforms hide how they lie."""
    if x.dim() != 4 or torch._C._are_functorch_transforms_active():
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def is_watched() -> bool:
    """Whether autograd or a transform looks on, which an operation in place would upset."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()

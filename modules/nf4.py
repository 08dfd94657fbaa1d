"""A frozen base of 4-bit weights in NF4 (QLoRA, arXiv 2305.14314), packed by bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .adapters.fingerprint import fingerprint
from .adapters.functions import compute_dtype
from .adapters.loftq import loftq_deltas

BLOCK = 64  # numbers with one scale, as in QLoRA
SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # that bitsandbytes computes in
_ATEN = torch.ops.aten
_KEEPING = (_ATEN.detach.default, _ATEN.clone.default, _ATEN._to_copy.default)


class NF4Weight(Tensor):
    """A frozen weight in 4 bits, and a scale for each 64 numbers.

    It has the shape and the type of the weight that it was made of, and moves and casts as that
    would: the type is the one that its values are read in. They are made anew for each operation,
    and a linear layer keeps the 4 bits alone for backward.

    Attributes:
        packed: Two numbers a byte, uint8 ``[n / 2, 1]``.
        scales: Of each block, float32 ``[n / 64]``.
        original_fingerprint: The digest of the weight that it was made of.
        lost: What quantisation lost of that weight, ``||NF4(W) - W|| / ||W||``.
    """

    packed: Tensor
    scales: Tensor
    original_fingerprint: str
    lost: float

    @staticmethod
    def __new__(
        cls, packed: Tensor, scales: Tensor, shape: Any, dtype: torch.dtype, *of_original: Any
    ) -> NF4Weight:
        """A tensor without memory of its own, around its parts."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)
        made.packed, made.scales = packed, scales
        made.original_fingerprint, made.lost = of_original
        return made

    @classmethod
    def of(cls, weight: Tensor) -> NF4Weight:
        """Quantises a weight."""
        from bitsandbytes.functional import quantize_4bit

        weight = weight.detach()
        values = weight.float()  # in half precision a number may come to lie on another level
        packed, state = quantize_4bit(
            values.contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
        )
        digest = fingerprint({"": weight})[""]
        made = cls(packed, state.absmax, weight.shape, weight.dtype, digest, 0.0)
        made.lost = float((made.values(torch.float32) - values).norm() / values.norm())
        return made

    def values(self, dtype: torch.dtype) -> Tensor:
        """The numbers that the 4 bits stand for, as a plain tensor."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        known = dtype if dtype in SCALE_TYPES else torch.float32
        state = QuantState(self.scales, self.shape, blocksize=BLOCK, quant_type="nf4", dtype=known)
        return dequantize_4bit(self.packed, state).to(dtype)

    def __repr__(self, **_: Any) -> str:
        return f"NF4Weight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first, kwargs = args[0], dict(kwargs or {})
        if isinstance(first, cls):
            if func._schema.is_mutable:
                raise RuntimeError("an NF4 weight is frozen, and cannot be written to")
            if func in _KEEPING:
                dtype = kwargs.pop("dtype", None) or first.dtype
                return first._with(lambda part: func(part, *args[1:], **kwargs), dtype)
        plain = tree_map(lambda x: x.values(x.dtype) if isinstance(x, cls) else x, (args, kwargs))
        return func(*plain[0], **plain[1])

    def _with(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> NF4Weight:
        parts = change(self.packed), change(self.scales)
        return NF4Weight(*parts, self.shape, dtype, self.original_fingerprint, self.lost)

    # By these two torch knows that a module which is moved must exchange the whole tensor.
    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return ["packed", "scales"], (self.dtype, self.original_fingerprint, self.lost)

    @staticmethod
    def __tensor_unflatten__(parts: Any, told: Any, size: Any, stride: Any) -> NF4Weight:
        return NF4Weight(parts["packed"], parts["scales"], size, *told)


class _Linear(torch.autograd.Function):
    """A linear layer that makes the values of its weight again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.values(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gy,), (weight,) = grads, ctx.saved_tensors
        gb = gy.reshape(-1, gy.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return gy @ weight.values(gy.dtype), None, gb


def _linear(input: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    dtype = compute_dtype(input)
    return _Linear.apply(input.to(dtype), weight, None if bias is None else bias.to(dtype))


def check_installed() -> None:
    """Raises ImportError unless bitsandbytes is there."""
    if find_spec("bitsandbytes") is None:
        raise ImportError("base_dtype nf4 is held by bitsandbytes: pip install 'litflora[nf4]'")


def quantize(model: nn.Module, parts: Sequence[str] = ("",)) -> None:
    """Holds the frozen weights of linear layers in NF4, in place; output layers stay as they are.

    LoftQ's deltas begin then, and see what it takes of their weights.

    Args:
        model: A module with a model of transformers in it, with adapters or without.
        parts: Names of the modules whose layers they are; none is the model itself.

    Raises:
        ValueError: They have no such layer.
    """
    owners = (m for m in model.modules() if hasattr(m, "get_output_embeddings"))
    heads = {owner.get_output_embeddings() for owner in owners}
    found = [each for part in parts for each in model.get_submodule(part).modules()]
    linear = [each for each in found if isinstance(each, nn.Linear) and each not in heads]
    layers = [layer for layer in linear if not layer.weight.requires_grad]
    if not layers:
        raise ValueError(
            "base_dtype nf4 is for frozen linear layers, and the language model has none: tune it "
            "by LoRA or FLoRA, or leave base_dtype out"
        )
    for layer in layers:
        begun = [(delta, delta.weight()) for delta in loftq_deltas(layer)]
        layer.weight = nn.Parameter(NF4Weight.of(layer.weight), requires_grad=False)
        for delta, original in begun:
            delta.begin(original)


def dequantize(model: nn.Module) -> dict[str, float]:
    """Gives weights in NF4 the type back that they had, in place.

    Args:
        model: Any module, with adapters or without; a merge comes after this.

    Returns:
        What quantisation lost of each weight, as a share of it.
    """
    lost = {}
    for name, weight in list(model.named_parameters()):
        if isinstance(weight, NF4Weight):
            layer, _, param = name.rpartition(".")
            plain = nn.Parameter(weight.values(weight.dtype), requires_grad=False)
            setattr(model.get_submodule(layer), param, plain)
            lost[name] = weight.lost
    return lost

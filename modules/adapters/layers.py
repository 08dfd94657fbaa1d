"""How a layer carries its deltas and stays what it was.

An adapted layer keeps its object, parameters and state-dict keys. Its class becomes a subclass
made on the fly, whose forward adds the active deltas, and it gains one child, ``adapters``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .cache import WeightCache, added
from .delta import Delta
from .functions import compute_dtype
from .ops import LookUpCall, MapCall, Op, op_of, rows, stride
from .paths import Choice, choose
from .sharded import is_gathered_for_calls
from .substitute import Sums, substituted
from .total import Total


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from.

    Attributes:
        tuning: The tuning that made it, as plain values.
        trained: Names of the base's own parameters that train along with it.
    """

    tuning: dict[str, Any] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()


class Deltas(nn.Module):
    """The deltas of one adapter on one layer, by the name of the parameter they change."""

    def __init__(self, origin: Origin) -> None:
        super().__init__()
        self.origin = origin

    def __getitem__(self, param: str) -> Delta:
        delta = self._modules[param]
        assert isinstance(delta, Delta)
        return delta

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def items(self) -> Iterator[tuple[str, Delta]]:
        """Pairs of parameter name and delta."""
        return ((param, self[param]) for param in self)


class AdapterSet(nn.Module):
    """All adapters of one layer, by name.

    Attributes:
        active: The adapters that act, with their weights.
        enabled: False inside `disabled`.
        merged: The adapters that the layer's weights hold already, with their weights.
        originals: The untouched weights, while something is merged.
        cache: W + dW, for inference.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: dict[str, float] = {}
        self.enabled = True
        self.merged: dict[str, float] = {}
        self.originals: dict[str, Tensor] = {}
        self.cache = WeightCache()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": WeightCache()}  # a copy makes its own

    def __getitem__(self, name: str) -> Deltas:
        deltas = self._modules[name]
        assert isinstance(deltas, Deltas)
        return deltas

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AdapterSet:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.originals = {name: fn(tensor) for name, tensor in self.originals.items()}
        self.cache.clear()
        return self

    def train(self, mode: bool = True) -> AdapterSet:
        """Sets the mode; in training no weight is kept."""
        if mode:
            self.cache.clear()
        return super().train(mode)

    def add(self, name: str, param: str, delta: Delta, origin: Origin) -> None:
        """Adds the delta of one parameter to the adapter ``name``."""
        if name not in self:
            self.add_module(name, Deltas(origin))
        self[name].add_module(param, delta)
        self[name].train(self.training)

    def remove(self, name: str) -> None:
        """Drops the adapter ``name``."""
        del self._modules[name]
        self.active.pop(name, None)

    def applied(self) -> dict[str, Total]:
        """The deltas to be added in forward, by parameter."""
        if not self.enabled:
            return {}
        return self.sums({n: w for n, w in self.active.items() if n not in self.merged})

    def sums(self, weights: dict[str, float]) -> dict[str, Total]:
        """The weighted deltas of the adapters named, by parameter."""
        terms: dict[str, list[tuple[Delta, float]]] = {}
        for name, weight in weights.items():
            if name in self and weight != 0.0:
                for param, delta in self[name].items():
                    terms.setdefault(param, []).append((delta, weight))
        return {param: Total(pairs) for param, pairs in terms.items()}


if TYPE_CHECKING:  # only ever mixed into a module, which it need not be by itself
    Layer = nn.Module
else:
    Layer = object


class Adapted(Layer):
    """The forward of an adapted layer; mixed in before the layer's own class."""

    adapters: AdapterSet
    _litflora_op: ClassVar[Op | None]
    _litflora_base: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer with ``W + dW`` in the place of W."""
        if self.adapters.merged and self.training and torch.is_grad_enabled():
            _warn_training_merged(self)
        sums = _sums(self)
        if not sums:
            return super().forward(*args, **kwargs)
        op, total = type(self)._litflora_op, self._known(sums)
        if op is None or total is None:
            with substituted(sums):
                return super().forward(*args, **kwargs)
        if kwargs:
            bound = inspect.signature(self._litflora_base.forward).bind(self, *args, **kwargs)
            args = bound.args[1:]
        return self._on_path(op(self, args), total, args[0])

    def known_sum(self) -> Total | None:
        """The deltas of a layer that is computed on one of the paths; None of any other."""
        return self._known(_sums(self))

    def _known(self, sums: Sums) -> Total | None:
        known = type(self)._litflora_op is not None and list(sums) == ["weight"]
        return sums["weight"][2] if known else None

    def choice(self, total: Total, x: Tensor, grad: bool) -> Choice:
        """What its path is chosen by."""
        weight, count = cast(Tensor, self.weight), rows(self, x, total.terms[0][0])
        dtype = compute_dtype(x)
        return Choice(total, count, weight, self.training, grad, dtype, stride(self))

    def _on_path(self, call: MapCall | LookUpCall, total: Total, x: Tensor) -> Tensor:
        choice = self.choice(total, x, torch.is_grad_enabled())
        path, weight = choose(choice), choice.weight
        if path == "kept" and is_gathered_for_calls(self):
            return call.with_weight(added(weight, total, call.dtype))
        if path == "kept":
            return call.with_weight(self.adapters.cache.get("weight", weight, total, call.dtype))
        return call.with_delta(total, path)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        if any(f"{prefix}{param}" in state for param in self.adapters.originals):
            args[-1].append(f"{prefix.rstrip('.')} is merged: unmerge before loading base weights")
            return
        super()._load_from_state_dict(state, prefix, *args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on the fly, so pickle and deepcopy are told how to make it again.
        state = self.__getstate__()  # type: ignore[no-untyped-call]
        return _restore, (self._litflora_base,), state


def _restore(base: type[nn.Module]) -> nn.Module:
    cls = adapted_class(base)
    return cls.__new__(cls)


def adapted_class(base: type[nn.Module]) -> type[Adapted]:
    """The adapted subclass of a layer class; one for each, so that equal layers have one type."""
    if base not in _CLASSES:
        op = op_of(base)
        body = {
            "_litflora_op": op and staticmethod(op),
            "_litflora_base": base,
            "__module__": base.__module__,
        }
        _CLASSES[base] = type(f"Adapted{base.__name__}", (Adapted, base), body)
    return _CLASSES[base]


_CLASSES: dict[type, type[Adapted]] = {}


def adapt(layer: nn.Module) -> AdapterSet:
    """Makes ``layer`` able to carry deltas, in place; returns the set that will hold them."""
    if not isinstance(layer, Adapted):
        layer.__class__ = adapted_class(type(layer))
        layer.adapters = AdapterSet().train(layer.training)
    return cast(Adapted, layer).adapters


def has_own_op(layer: nn.Module) -> bool:
    """Whether an adapted layer is computed here, not by its own forward with another weight."""
    return isinstance(layer, Adapted) and type(layer)._litflora_op is not None


def origin_of(model: nn.Module, name: str) -> Origin:
    """Where the adapter ``name`` comes from; an empty origin if the model has none so called."""
    found = (adapters[name].origin for _, _, adapters in adapted_layers(model) if name in adapters)
    return next(found, Origin())


def restore(layer: nn.Module) -> None:
    """Takes every trace of litflora off ``layer``."""
    assert isinstance(layer, Adapted)
    del layer._modules["adapters"]
    layer.__class__ = layer._litflora_base  # type: ignore[assignment]


def adapted_layers(
    model: nn.Module, every_name: bool = False
) -> Iterator[tuple[str, nn.Module, AdapterSet]]:
    """Name, layer and adapters of every adapted layer of ``model``.

    Args:
        model: The model.
        every_name: Give a layer that is used twice under both of its names.
    """
    for name, module in model.named_modules(remove_duplicate=not every_name):
        if isinstance(module, Adapted):
            yield name, module, module.adapters


@contextmanager
def watched(model: nn.Module, look: Callable[[str, Adapted, Tensor], None]) -> Iterator[None]:
    """Shows ``look`` the name, layer and input of every adapted layer that a forward calls."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(iter((*args, *kwargs.values())), None)
            if isinstance(layer, Adapted) and isinstance(x, Tensor):
                look(name, layer, x)

        return hook

    layers = list(adapted_layers(model))
    handles = [
        layer.register_forward_pre_hook(hook_of(name), with_kwargs=True)
        for name, layer, _ in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _warn_training_merged(layer: Adapted) -> None:
    if not torch.compiler.is_compiling():
        merged = ", ".join(layer.adapters.merged)
        warnings.warn(
            f"adapter {merged} is merged and gets no gradient: unmerge(model) before training",
            stacklevel=3,
        )


def _sums(layer: Any) -> Sums:
    """Owner, parameter and delta of every weight that the layer's forward reads."""
    found = {param: (layer, param, total) for param, total in layer.adapters.applied().items()}
    if isinstance(layer, nn.MultiheadAttention) and isinstance(layer.out_proj, Adapted):
        # Attention reads this child's weight without ever calling it.
        for param, total in layer.out_proj.adapters.applied().items():
            found[f"out_proj.{param}"] = (layer.out_proj, param, total)
    return found

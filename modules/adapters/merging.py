"""Merging deltas into the weights, and taking them out again bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .base import base_weight
from .errors import AdapterError
from .inject import adapter_names, strip
from .layers import AdapterSet, adapted_layers
from .quantized import first_quantized
from .sharded import is_sharded


@dataclass
class MergedWeight:
    """One merged weight.

    Attributes:
        name: The weight.
        delta_norm: Frobenius norm of the exact dW.
        lost: Share of dW that rounding to the weight's type lost: ||cast(W + dW) - (W + dW)||
            over ||dW||.
    """

    name: str
    delta_norm: float
    lost: float


@dataclass
class MergeReport:
    """What a merge did."""

    dtype: torch.dtype | None = None
    rows: list[MergedWeight] = field(default_factory=list)

    @property
    def lost(self) -> float:
        """The largest share that any delta lost to rounding."""
        return max((row.lost for row in self.rows), default=0.0)

    def __str__(self) -> str:
        text = f"merged {len(self.rows)} weights"
        if not self.rows:
            return text
        worst = max(self.rows, key=lambda row: row.lost)
        if worst.lost == 0:
            return f"{text}; rounding lost nothing"
        return f"{text}; rounding lost at most {worst.lost:.2g} of a delta ({worst.name})"


@torch.no_grad()
def merge(
    model: nn.Module, names: str | Sequence[str] | None = None, unload: bool = False
) -> MergeReport:
    """Adds deltas to the weights, computed in float32 or wider and cast once.

    Args:
        model: A model with adapters.
        names: The adapters to merge, with their present weights; None is every active one.
        unload: Leave a plain model without a trace of litflora, which cannot be unmerged.

    Returns:
        For each weight, the size of its delta and what rounding lost of it.

    Raises:
        AdapterError: A delta holds a NaN or an infinity, or an adapter is not active. The model
            is then as it was.
    """
    chosen = _choose(model, names)
    touched: list[tuple[nn.Module, AdapterSet, dict[str, float]]] = []
    report = MergeReport()
    try:
        for name, layer, adapters in adapted_layers(model):
            before = dict(adapters.merged)
            touched.append((layer, adapters, before))
            adapters.merged |= {n: adapters.active[n] for n in chosen if n in adapters}
            if adapters.merged != before:
                report.rows += _write(name, layer, adapters)
    except BaseException:
        for layer, adapters, before in touched:
            adapters.merged = before
            _write("", layer, adapters)
        raise
    if unload:
        for _, _, adapters in adapted_layers(model):
            adapters.originals.clear()
        strip(model)
    return report


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Puts the original weights back, bit for bit; does nothing where nothing is merged."""
    _refuse_disabled(model)
    for _, layer, adapters in adapted_layers(model):
        adapters.merged = {}
        _write("", layer, adapters)


def _choose(model: nn.Module, names: str | Sequence[str] | None) -> list[str]:
    known = adapter_names(model)
    if not known:
        raise AdapterError("the model has no adapter to merge")
    if is_sharded(model):
        raise AdapterError(
            "the model is sharded: save the adapter, and merge it into a base that is whole"
        )
    quantized = first_quantized(model)
    if quantized is not None:
        raise AdapterError(f"{quantized} is quantised: litflora.nf4.dequantize(model) comes first")
    _refuse_disabled(model)
    active = {name for _, _, adapters in adapted_layers(model) for name in adapters.active}
    if names is None:
        names = [name for name in known if name in active]
    asked = [names] if isinstance(names, str) else list(names)
    for name in asked:
        if name not in active:
            state = "not active" if name in known else "unknown"
            raise AdapterError(f"adapter {name!r} is {state}; active: {', '.join(sorted(active))}")
    return asked


def _refuse_disabled(model: nn.Module) -> None:
    if any(not adapters.enabled for _, _, adapters in adapted_layers(model)):
        raise AdapterError("the adapters are disabled: merge and unmerge outside `disabled`")


def _write(name: str, layer: nn.Module, adapters: AdapterSet) -> list[MergedWeight]:
    """Makes the layer's weights what ``adapters.merged`` says, starting from the originals."""
    report = []
    adapters.cache.clear()
    sums = adapters.sums(adapters.merged)
    for param in {*sums, *adapters.originals}:
        weight = layer._parameters[param]
        assert weight is not None
        if param not in sums:
            _replace(weight, adapters.originals.pop(param))
            continue
        original = base_weight(layer, param).detach()
        # Float32 at least: a bf16 sum would round dW away before it is even cast.
        delta = sums[param](*(t.to(_wide(t)) for t in sums[param].tensors()))
        label = f"{name}.{param}".lstrip(".")
        if not bool(torch.isfinite(delta).all()):
            raise AdapterError(f"the delta of {label} is not finite: nothing was merged")
        exact = original.to(torch.promote_types(_wide(original), delta.dtype)) + delta
        merged = torch.empty_like(original).copy_(exact)  # in the memory format of the original
        if not bool(torch.isfinite(merged).all()):
            raise AdapterError(f"W + dW of {label} is not finite in {original.dtype}")
        norm = float(delta.norm())
        lost = float((merged.to(exact.dtype) - exact).norm()) / norm if norm else 0.0
        report.append(MergedWeight(label, norm, lost))
        adapters.originals[param] = original
        _replace(weight, merged)
    return report


def _replace(weight: nn.Parameter, value: Tensor) -> None:
    """Puts in another value, and lets a backward that still needs the old one know."""
    weight.data = value
    torch.autograd.graph.increment_version(weight)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)

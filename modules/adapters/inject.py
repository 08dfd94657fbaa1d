"""Putting adapters into a model, choosing among them, and taking them out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .delta import Delta
from .errors import AdapterError
from .layers import AdapterSet, Origin, adapt, adapted_layers, restore
from .per_module import PerModule
from .planning import Planned, plan, resolve_modules
from .recompute import is_pointwise, note
from .selective import Selective
from .summary import Summary, summary
from .targets import candidates, head_names, is_inside, refuse_lazy
from .tuning import Tuning


def inject(
    model: nn.Module,
    tuning: Tuning,
    name: str = "default",
    train: Sequence[str] = (),
    device: torch.device | None = None,
) -> Summary:
    """Freezes a model and adds trainable deltas to it, in place.

    Args:
        model: Any module; its task head (timm's ``get_classifier``, or a child called head,
            heads, fc, classifier or lm_head) is never adapted, unless `PerModule` names it.
        tuning: What to add, such as ``FLoRA(rank=8)``, what to train, such as ``BitFit()``, or
            either for each module (see `PerModule`).
        name: Name of the adapter. A second adapter under another name joins the first and takes
            its place as the active one (see `activate`).
        train: Names of modules that stay trainable as they are, above all the head.
        device: Where the deltas live; None is where their weights do. It gives deltas to a base
            that has no memory yet, on the meta device.

    Returns:
        The summary of what is trained.

    Raises:
        AdapterError: A pattern matches nothing, a weight cannot be adapted, or the name is
            taken. The model is then as it was.
    """
    refuse_lazy(model)
    trained = resolve_modules(model, train)
    if not isinstance(tuning, Selective):
        check_name(model, name)
    planned, selected = plan(model, tuning, trained, device)
    own = {id(p) for module in trained for p in model.get_submodule(module).parameters()}
    own |= {id(parameter) for parameter in selected}
    what = type(tuning).__name__
    if adapter_names(model) and (selected or not planned):
        raise AdapterError(f"{what} trains the base, and the model has adapters: unload them first")
    if not own and not planned:
        raise AdapterError(f"{what} trains nothing here: name the head, as in train=['head']")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)
    names = (key for key, p in model.named_parameters(remove_duplicate=False) if id(p) in own)
    attach(model, name, planned, Origin(tuning.to_dict(), frozenset(names)))
    report = summary(model)
    frozen = [head for head in head_names(model) if not _is_settled(head, trained, tuning)]
    if planned and frozen:
        report.warnings.append(f"{frozen[0]} is the head and is frozen: train={frozen} trains it")
    if planned and getattr(tuning, "targets", ()) is None:
        report.warnings += _passed_over(model, len(planned))
    return report


def _is_settled(head: str, trained: Sequence[str], tuning: Tuning) -> bool:
    """Whether it was said what becomes of a head."""
    parts = tuning.modules if isinstance(tuning, PerModule) else {}
    whole = [module for module, part in parts.items() if isinstance(part, Selective)]
    return is_inside(head, [*trained, *whole]) or any(is_inside(part, [head]) for part in parts)


def _passed_over(model: nn.Module, adapted: int) -> list[str]:
    """Says so if the default targets leave out most of a convolutional network."""
    left = sum(candidate.info.kind in ("conv", "depthwise") for candidate in candidates(model))
    if left <= adapted:
        return []
    return [f"{left} convolutions beyond 1x1 are not adapted: targets='all' adapts them too"]


def attach(model: nn.Module, name: str, planned: Sequence[Planned], origin: Origin) -> None:
    """Attaches built deltas to their layers and makes their adapter the only active one."""
    for item in planned:
        adapt(item.candidate.module).add(name, item.candidate.param, item.delta, origin)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and hasattr(module.out_proj, "adapters"):
            adapt(module)  # it reads the weight of that child without calling it
        if isinstance(module, nn.TransformerEncoderLayer) and any(adapted_layers(module)):
            module.register_forward_pre_hook(_no_fast_path)
        if planned and is_pointwise(module) and note not in module._forward_hooks.values():
            module.register_forward_hook(note, with_kwargs=True)
    if planned:
        activate(model, name)


def check_name(model: nn.Module, name: str) -> None:
    """Raises unless ``name`` can be the name of a new adapter of ``model``."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise AdapterError(f"an adapter cannot be called {name!r}: use letters, digits, _ and -")
    if hasattr(AdapterSet(), name):
        raise AdapterError(f"an adapter cannot be called {name!r}: the name is reserved")
    if name in adapter_names(model):
        raise AdapterError(
            f"the model has an adapter {name!r} already: delete it or take another name"
        )
    _refuse_merged(model, "add an adapter")


def _no_fast_path(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: with a hook, torch runs an encoder layer's children in Python.

    Its fused kernel for inference reads their weights alone and would pass the deltas by.
    """


# Several adapters on one model -------------------------------------------------------------------


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters of ``model``, in the order they were added."""
    return list(
        dict.fromkeys(name for _, _, adapters in adapted_layers(model) for name in adapters)
    )


def activate(model: nn.Module, names: str | Sequence[str] | Mapping[str, float]) -> None:
    """Chooses which adapters act; their deltas are added up.

    The deltas of active adapters are trainable, those of the others are not.

    Args:
        model: A model with adapters.
        names: One name, several, or weights by name. An empty list leaves the base alone.
    """
    if isinstance(names, str):
        names = [names]
    weights = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    _check_known(model, weights)
    if not all(math.isfinite(weight) for weight in weights.values()):
        raise AdapterError(f"the weights of adapters must be finite numbers: {weights}")
    _refuse_merged(model, "choose another adapter")
    for _, _, adapters in adapted_layers(model):
        adapters.active = {name: weight for name, weight in weights.items() if name in adapters}
        for name in adapters:
            for _, delta in adapters[name].items():
                _set_trainable(delta, name in weights)


def _set_trainable(delta: Delta, trainable: bool) -> None:
    for _, leaf in delta.leaves():
        if leaf is not None:
            for name, parameter in leaf.named_parameters():
                parameter.requires_grad_(trainable and name not in leaf.frozen())


def delete(model: nn.Module, name: str) -> None:
    """Takes one adapter out; with the last one, every trace of litflora goes.

    Raises:
        AdapterError: There is no such adapter, or its deltas are merged.
    """
    _check_known(model, [name])
    _refuse_merged(model, "delete an adapter")
    for _, _, adapters in adapted_layers(model):
        if name in adapters:
            adapters.remove(name)
    for _, layer, adapters in list(adapted_layers(model)):
        if not len(adapters) and not _serves_child(layer):
            restore(layer)
    _drop_unneeded_hooks(model)


def unload(model: nn.Module) -> None:
    """Takes every adapter out and leaves the base; parameters stay frozen as they are."""
    _refuse_merged(model, "unload")
    strip(model)


def strip(model: nn.Module) -> None:
    """Restores every adapted layer's class, whatever its weights hold."""
    for _, layer, _ in list(adapted_layers(model)):
        restore(layer)
    _drop_unneeded_hooks(model)


def _serves_child(layer: nn.Module) -> bool:
    """Whether an attention layer is adapted for the sake of its output projection."""
    if not isinstance(layer, nn.MultiheadAttention):
        return False
    child = getattr(layer.out_proj, "adapters", None)
    return isinstance(child, AdapterSet) and len(child) > 0


def _drop_unneeded_hooks(model: nn.Module) -> None:
    adapted = any(adapted_layers(model))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not any(adapted_layers(module)):
            _drop_hook(module._forward_pre_hooks, _no_fast_path)
        if not adapted:
            for key in _drop_hook(module._forward_hooks, note):
                module._forward_hooks_with_kwargs.pop(key, None)


def _drop_hook(hooks: dict[int, Any], hook: Any) -> list[int]:
    keys = [key for key, other in hooks.items() if other is hook]
    for key in keys:
        del hooks[key]
    return keys


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, no delta acts, merged or not: the model computes what its frozen base does.

    Parameters that were trained in place, such as a head, stay trained.
    """
    switched = [
        (layer, adapters) for _, layer, adapters in adapted_layers(model) if adapters.enabled
    ]
    for layer, adapters in switched:
        adapters.enabled = False
        _exchange(layer, adapters)
    try:
        yield model
    finally:
        for layer, adapters in switched:
            adapters.enabled = True
            _exchange(layer, adapters)


def _exchange(layer: nn.Module, adapters: AdapterSet) -> None:
    """Exchanges merged weights and their kept originals."""
    for param, original in adapters.originals.items():
        weight = layer._parameters[param]
        assert weight is not None
        weight.data, adapters.originals[param] = original, weight.data


@torch.no_grad()
def route(model: nn.Module, names: Sequence[str | None], *args: Any, **kwargs: Any) -> Any:
    """Runs a batch in which each sample has its own adapter; for inference.

    The samples of one adapter run together, so every sample is computed once.

    Args:
        model: A model with adapters, not merged.
        names: The adapter of each sample; None is the base.
        *args: Positional inputs; every tensor among them is batched along its first dimension.
        **kwargs: Keyword inputs, likewise.

    Returns:
        The model's output in the order of ``names``.

    Raises:
        AdapterError: A name is unknown, or the batch is not as long as ``names``.
    """
    _check_known(model, [name for name in names if name is not None])
    lengths = {t.shape[0] for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    if lengths != {len(names)}:
        raise AdapterError(f"{len(names)} adapter names for inputs of batch size {sorted(lengths)}")
    if model.training:
        raise AdapterError("route is for inference: call model.eval() first")
    before = [(adapters, adapters.active) for _, _, adapters in adapted_layers(model)]
    _refuse_merged(model, "route")
    outputs, order = [], []
    try:
        for name in dict.fromkeys(names):
            picked = [i for i, other in enumerate(names) if other == name]
            for adapters, _ in before:
                adapters.active = {name: 1.0} if name is not None and name in adapters else {}
            outputs.append(_run_picked(model, picked, args, kwargs))
            order += picked
    finally:
        for adapters, active in before:
            adapters.active = active
    back = torch.tensor(order).argsort()
    return pytree.tree_map(lambda *parts: torch.cat(parts)[back.to(parts[0].device)], *outputs)


def _run_picked(model: nn.Module, picked: list[int], args: Any, kwargs: Any) -> Any:
    pick = lambda x: x[picked] if isinstance(x, Tensor) else x  # noqa: E731
    args, kwargs = pytree.tree_map(pick, (args, kwargs))
    return model(*args, **kwargs)


def trainable_parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters that train, by name: those of deltas, and the others."""
    inside = {id(p) for _, _, adapters in adapted_layers(model) for p in adapters.parameters()}
    found: dict[str, dict[str, nn.Parameter]] = {"adapters": {}, "other": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found["adapters" if id(parameter) in inside else "other"][name] = parameter
    return found


def _check_known(model: nn.Module, names: Any) -> None:
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise AdapterError(f"no adapter {name!r}: the model has {', '.join(known) or 'none'}")


def _refuse_merged(model: nn.Module, what: str) -> None:
    for name, _, adapters in adapted_layers(model):
        if adapters.merged:
            merged = ", ".join(adapters.merged)
            raise AdapterError(f"cannot {what} while {merged} is merged into {name}: unmerge first")

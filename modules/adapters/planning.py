"""What a tuning asks for: the deltas, built and not yet attached, and the parameters that train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .base import Base
from .delta import Delta, WeightInfo
from .errors import AdapterError
from .per_module import PerModule
from .selective import Frozen, Probe, Selective
from .split import split
from .targets import (
    Candidate,
    candidates,
    head_names,
    is_inside,
    match_names,
    nearest,
    refuse_unusable,
    select,
)
from .tuning import DeltaTuning, Tuning


@dataclass
class Planned:
    """A delta that is built and waits to be attached."""

    candidate: Candidate
    delta: Delta

    def bind(self) -> None:
        """Tells the delta where its weight is."""
        self.delta.bind(Base(self.candidate.module, self.candidate.param))


def plan(
    model: nn.Module, tuning: Tuning, trained: Sequence[str], device: torch.device | None = None
) -> tuple[list[Planned], list[nn.Parameter]]:
    """Builds every delta that a tuning asks for, without touching the model.

    Args:
        model: The model.
        tuning: What to add or to train.
        trained: Names of modules that train whole, and are not adapted.
        device: Where the deltas are built; None is where their weights are.

    Returns:
        The deltas, and the parameters of the base that the tuning trains.
    """
    planned: list[Planned] = []
    selected: list[nn.Parameter] = []
    for module, part in _parts(model, tuning, trained):
        if isinstance(part, Selective):
            selected += _selected(model, part, module)
        elif isinstance(part, DeltaTuning):
            planned += _deltas(model, part, module, trained, device)
        else:
            raise AdapterError(f"tuning must be a Tuning such as FLoRA(rank=8), not {part!r}")
    return planned, selected


def resolve_modules(model: nn.Module, train: Sequence[str]) -> list[str]:
    """Names of the modules that the patterns of ``train`` name; raises if one names none."""
    names = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    for pattern in _as_list(train):
        # An exact name means that module, not every inner one whose name ends the same.
        hits = [pattern] if pattern in names else match_names(pattern, names)
        if not hits:
            raise AdapterError(f"train: {pattern!r} matches no module. {nearest(pattern, names)}")
        found += hits
    return found


def _parts(
    model: nn.Module, tuning: Tuning, trained: Sequence[str]
) -> Iterator[tuple[str, Tuning]]:
    """Module names and their tunings; "" is the whole model."""
    if not isinstance(tuning, PerModule):
        yield "", tuning
        return
    names = [name for name, _ in model.named_modules() if name]
    for module, part in tuning.modules.items():
        if module not in names:
            raise AdapterError(f"PerModule: no module is {module!r}. {nearest(module, names)}")
        if is_inside(module, trained):
            raise AdapterError(
                f"{module} is to train whole, by train=, and has {type(part).__name__} in "
                "PerModule: take it out of one of them"
            )
        yield module, part


def _selected(model: nn.Module, tuning: Selective, module: str) -> list[nn.Parameter]:
    found = list(tuning.select(model.get_submodule(module)))
    if module and not found and not isinstance(tuning, Frozen | Probe):
        raise AdapterError(f"{type(tuning).__name__} trains nothing in {module}")
    return found


def _deltas(
    model: nn.Module,
    tuning: DeltaTuning,
    module: str,
    trained: Sequence[str],
    device: torch.device | None,
) -> list[Planned]:
    everything = [c for c in candidates(model) if not module or is_inside(c.layer, [module])]
    # A head is adapted only if it, or a module in it, is named on its own.
    heads = [h for h in head_names(model) if not is_inside(module, [h])]
    heads += trained
    pool = [c for c in everything if not is_inside(c.layer, heads) or c.layer == ""]
    targets = _as_list("linear" if tuning.targets is None else tuning.targets)
    _refuse_heads(targets, pool, everything, heads)
    chosen = select(pool, targets)
    excluded = {c.info.name for c in select(everything, _as_list(tuning.exclude), "exclude")}
    chosen = [c for c in chosen if c.info.name not in excluded]
    if not chosen:
        raise AdapterError(f"exclude={tuning.exclude!r} leaves nothing of targets={targets!r}")
    for candidate in chosen:
        refuse_unusable(candidate, model)
    overrides = _overrides(tuning, chosen)
    planned = [
        Planned(c, _build(tuning, c.info.on(device), overrides[c.info.name])) for c in chosen
    ]
    for each in planned:
        each.bind()
        each.delta.start()
    return planned


def _build(tuning: DeltaTuning, info: WeightInfo, overrides: dict[str, Any]) -> Delta:
    parts = overrides.pop("parts", None)
    if parts is not None:
        whole = split(info, parts, lambda part: _build(tuning, part, dict(overrides)))
        whole.recompute = tuning.recompute == "pointwise"
        return whole
    delta = tuning.build(info, overrides)
    delta.recompute = tuning.recompute == "pointwise"
    if (tuning.dropout > 0 or tuning.path == "side") and not (info.has_side and delta.tucker()):
        wish = "path='side'" if tuning.path == "side" else "dropout"
        raise AdapterError(
            f"{info.name} has no side path, which {wish} needs: exclude it, or leave {wish} off"
        )
    return delta


def _overrides(tuning: DeltaTuning, chosen: Sequence[Candidate]) -> dict[str, dict[str, Any]]:
    """The settings given by pattern, for each chosen weight; the first pattern that fits wins."""
    found: dict[str, dict[str, Any]] = {candidate.info.name: {} for candidate in chosen}
    for setting, patterns in tuning.patterns().items():
        for pattern, value in patterns.items():
            for candidate in select(chosen, [pattern], setting):
                found[candidate.info.name].setdefault(setting, value)
    return found


def _refuse_heads(
    targets: list[Any], pool: list[Candidate], everything: list[Candidate], heads: list[str]
) -> None:
    """Says of a target that names the head alone why it is refused."""
    for target in targets:
        try:
            select(pool, [target])
        except AdapterError:
            hits = select(everything, [target])  # raises the first error again if there is none
            raise AdapterError(
                f"targets: {target!r} names only {hits[0].layer}, which is the task head: "
                f"it is trained whole, by train=[{hits[0].layer!r}], not adapted"
            ) from None


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]

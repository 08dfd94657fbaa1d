"""The tuning of a part, for each of the modules that it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..adapters import Tuning
from ..adapters.selective import Selective
from ..adapters.targets import KEYWORDS, Candidate, candidates, is_inside, matches
from ..adapters.tuning import DeltaTuning
from .pretrained import PretrainedNet


def part_tunings(net: PretrainedNet, part: str, tuning: Tuning) -> dict[str, Tuning]:
    """The tuning of each module of a part; of modules without blocks only where it means them.

    Deltas go to a stem or to an output layer where a pattern names it. Full trains all of a part;
    other choices of parameters train what they find.

    Args:
        net: The network.
        part: The part's name.
        tuning: Its tuning.
    """
    names = net.parts()[part]
    if isinstance(tuning, Selective):
        own = [name for name in names if _trains_in(net.get_submodule(name), tuning)]
        return dict.fromkeys(own or names[:1], tuning)
    if not isinstance(tuning, DeltaTuning):
        return dict.fromkeys(names, tuning)  # which PerModule refuses
    everything = candidates(net)
    pools = [[c for c in everything if is_inside(c.layer, [name])] for name in names]
    whole = _within(tuning, pools[0], pools[1:])
    unread = [f"{name}.*" for name in net.unread()] if part == "tower" else []
    left_out = [pattern for pattern in unread if _has(pattern, pools[0])]
    whole = dataclasses.replace(whole, exclude=[*_listed(whole.exclude), *left_out])
    others = [_within(tuning, pool) for pool in pools[1:]]
    return {
        name: own for name, own in zip(names, [whole, *others], strict=True) if own.targets != []
    }


def _within(
    tuning: DeltaTuning,
    pool: Sequence[Candidate],
    others: Sequence[Sequence[Candidate]] | None = None,
) -> DeltaTuning:
    """The tuning with what it means for one module of several.

    Args:
        tuning: The tuning.
        pool: The weights of the module.
        others: Those of the others, if this one has the blocks: what means none of them is for it.
    """

    def kept(pattern: Any) -> bool:
        if others is None:
            return _names(pattern, pool)
        return _has(pattern, pool) or not any(_names(pattern, other) for other in others)

    settings: dict[str, Any] = {"exclude": list(filter(kept, _listed(tuning.exclude)))}
    for key, patterns in tuning.patterns().items():
        settings[key] = {pattern: value for pattern, value in patterns.items() if kept(pattern)}
    if tuning.targets is not None or others is None:
        settings["targets"] = list(filter(kept, _listed(tuning.targets)))
    return dataclasses.replace(tuning, **settings)


def _has(pattern: Any, pool: Sequence[Candidate]) -> bool:
    return any(matches(pattern, candidate) for candidate in pool)


def _names(pattern: Any, pool: Sequence[Candidate]) -> bool:
    """Whether a pattern names any of the weights; keywords and classes name no module."""
    return isinstance(pattern, str) and pattern not in KEYWORDS and _has(pattern, pool)


def _trains_in(module: nn.Module, tuning: Selective) -> bool:
    return any(True for _ in tuning.select(module))


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]

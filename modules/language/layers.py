"""The layers of a network with two stacks of blocks, in the order that an image passes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from ..adapters.targets import is_inside

Patterns = list[tuple[str, None]]

# timm's word for the part of a network that is one layer deep in learning rates and sharding.
LAYER = r"\.(\d+)"


def block_lists(model: nn.Module) -> list[str]:
    """Names of the lists that hold a model's blocks, of what transformers splits at.

    Raises:
        ValueError: There are none.
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(not kinds.isdisjoint(_class_names(child)) for child in module)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} names no blocks in _no_split_modules")
    return found


def _class_names(module: nn.Module) -> set[str]:
    """Also of what it derives from: a block that is checkpointed has a class of its own."""
    return {kind.__name__ for kind in type(module).__mro__}


def inside(names: Iterable[str]) -> Patterns:
    """Patterns, as timm has them, for all in the modules of these names, which are one layer."""
    return [(rf"^{re.escape(name)}\.", None) for name in names]


def numbered(lists: Iterable[str], coarse: bool) -> Patterns:
    """Patterns for the blocks in lists of these names, each a layer; coarse, all are one."""
    return inside(lists) if coarse else [(f"^{re.escape(name)}{LAYER}", None) for name in lists]


def language_groups(
    net: nn.Module, name: str, lists: Sequence[str], coarse: bool
) -> dict[str, Patterns]:
    """Patterns for the layers of a language model, which follow those of the tower.

    What is left, a last norm and the output layer, counts as the head does.

    Args:
        net: The whole network.
        name: The language model's name in it.
        lists: Names in the network of the lists that hold its blocks.
        coarse: Count all blocks as one layer.
    """
    modules = net.get_submodule(name).named_modules(prefix=name)
    words = [own for own, module in modules if isinstance(module, nn.Embedding)]
    stem = inside(own for own in words if not is_inside(own, lists))
    return {"language_stem": stem, "language_blocks": numbered(lists, coarse)}

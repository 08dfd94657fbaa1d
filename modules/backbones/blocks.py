"""The blocks of a backbone: what is checkpointed, wrapped and sharded one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks(net: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a timm model, or of a wrapper of one, by name and in the order of the network.

    They are what its ``group_matcher`` counts as one layer of the middle: a transformer's block, a
    ConvNeXt's block or downsampling. A block inside another one is left out, and so is one without
    parameters.

    Args:
        net: A model with timm's ``group_matcher``.

    Raises:
        ValueError: The model has none, as when timm names no blocks in it.
    """
    groups = net.group_matcher(coarse=False)
    # A few models give a function in the place of patterns.
    patterns = list(_numbered(groups.get("blocks"))) if isinstance(groups, dict) else []
    found: dict[str, nn.Module] = {}
    for name, module in net.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if inside or not any(re.fullmatch(pattern, name) for pattern in patterns):
            continue
        if any(True for _ in module.parameters()):
            found[name] = module
    if not found:
        raise ValueError(f"{type(net).__name__} has no blocks that timm knows of: take another")
    return found


def _numbered(groups: Any) -> Iterator[str]:
    """The patterns with a number in what ``group_matcher`` gives; a last norm comes without."""
    for group in [groups] if isinstance(groups, str) else groups or ():
        pattern = group if isinstance(group, str) else group[0]
        if re.compile(pattern).groups:
            yield pattern


class Checkpointed:
    """The forward of a block that keeps its inputs alone; mixed in before the block's own class."""

    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the block, and once more in backward."""
        forward = super().forward  # type: ignore[misc]
        if not self.training:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def checkpoint_activations(net: nn.Module, how: str) -> None:
    """Has blocks keep their inputs alone, and run again in backward.

    Names, parameters and state-dict keys stay; the class of a block becomes a subclass of its own.

    Args:
        net: A model with `blocks`, adapted or not.
        how: ``none``, ``blocks`` or ``every-k``: each k-th block, the first among them.

    Raises:
        ValueError: It is something else, or the model has no blocks.
    """
    step = check_checkpointing(how)
    if step == 0:
        return
    for module in list(blocks(net).values())[::step]:
        base = type(module)
        module.__class__ = type(f"Checkpointed{base.__name__}", (Checkpointed, base), {})


def check_checkpointing(how: str) -> int:
    """How far apart the checkpointed blocks are; 0 if there are none.

    Raises:
        ValueError: It is not ``none``, ``blocks`` or ``every-k`` with a number k.
    """
    if how in ("none", "blocks"):
        return int(how == "blocks")
    every = re.fullmatch(r"every-([1-9]\d*)", how)
    if every is None:
        raise ValueError(
            f"activation_checkpointing is none, blocks, or every-k as in every-2, not {how!r}"
        )
    return int(every[1])

"""The blocks of a backbone: what is checkpointed, wrapped and sharded one at a time."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

# Groups of blocks: timm's, and those of a language model that takes what a backbone has seen.
BLOCKS = ("blocks", "language_blocks")


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
    # A block has a number; a last norm that is counted with them comes without.
    patterns = [p for p in block_patterns(net, coarse=False) if re.compile(p).groups]
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


def block_patterns(net: nn.Module, coarse: bool) -> list[str]:
    """The patterns of blocks in what ``group_matcher`` gives.

    Args:
        net: A model with timm's ``group_matcher``.
        coarse: How it is asked.
    """
    groups = net.group_matcher(coarse=coarse)
    if not isinstance(groups, dict):  # a few models give a function in the place of patterns
        return []
    told = [groups.get(name) or () for name in BLOCKS]
    listed = [[group] if isinstance(group, str) else group for group in told]
    return [each if isinstance(each, str) else each[0] for group in listed for each in group]


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

"""What a tuning adapts when nothing is said: the layers of the blocks, not stem nor head."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from ..adapters import FLoRA, Tuning


def default_targets(net: nn.Module, tuning: Tuning) -> list[str]:
    """Patterns for the layers that a tuning adapts by default in a timm model.

    Every method adapts the linear and 1x1 layers of the blocks. FLoRA keeps a kernel's shape and
    so adapts the other convolutions of the blocks too: ConvNeXt's depthwise and downsampling.

    Args:
        net: A timm model; its ``group_matcher`` says what its blocks are.
        tuning: The tuning that the targets are for.

    Returns:
        Globs such as ``blocks.*.attn.qkv``; each matches at least one layer of ``net``.
    """
    names = [_glob(name) for name in _adapted(net, every_conv=isinstance(tuning, FLoRA))]
    if not names:
        raise ValueError(
            f"{type(net).__name__} has no linear or 1x1 layer in blocks: name tuning.targets"
        )
    return list(dict.fromkeys(names))


def _adapted(net: nn.Module, every_conv: bool) -> Iterator[str]:
    blocks = net.group_matcher(coarse=True)["blocks"]
    in_blocks = [blocks] if isinstance(blocks, str) else [pattern for pattern, _ in blocks]
    for name, module in net.named_modules():
        if not any(re.match(pattern, name) for pattern in in_blocks):
            continue
        conv = isinstance(module, nn.Conv2d)
        pointwise = conv and max(module.kernel_size) == 1 and module.groups == 1
        if isinstance(module, nn.Linear) or pointwise or (conv and every_conv):
            yield name


def _glob(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)

"""What a tuning adapts when nothing is said: the layers of the blocks, not stem nor head."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from torch import nn

from ..adapters import FLoRA, PerModule, Tuning
from ..adapters.targets import is_inside
from .blocks import block_patterns


def with_targets(net: nn.Module, tuning: Tuning, module: str = "") -> Tuning:
    """The same tuning with default targets where it names none.

    Args:
        net: A timm model.
        tuning: Any tuning.
        module: The module of ``net`` that it is for; "" is all.
    """
    if isinstance(tuning, PerModule):
        return PerModule({name: with_targets(net, t, name) for name, t in tuning.modules.items()})
    if getattr(tuning, "targets", ()) is not None:
        return tuning
    return dataclasses.replace(tuning, targets=default_targets(net, tuning, module))


def default_targets(net: nn.Module, tuning: Tuning, module: str = "") -> list[str]:
    """Patterns for the layers that a tuning adapts by default in a timm model.

    Every method adapts the linear and 1x1 layers of the blocks. FLoRA keeps a kernel's shape and
    so adapts the other convolutions of the blocks too: ConvNeXt's depthwise and downsampling. In a
    module without blocks, as a head is, all of its layers of these kinds are adapted, and where it
    has none of them, its other convolutions.

    Args:
        net: A timm model; its ``group_matcher`` says what its blocks are.
        tuning: The tuning that the targets are for.
        module: The module of ``net`` that is tuned; "" is all.

    Returns:
        Globs such as ``blocks.*.attn.qkv``, each of which matches at least one layer of the module,
        or a keyword.
    """
    every_conv = isinstance(tuning, FLoRA)
    adapted = _adapted(net, every_conv)
    names = [_glob(name) for name in adapted if not module or is_inside(name, [module])]
    if module and not names:
        inside = net.get_submodule(module).modules()
        flat = any(isinstance(m, nn.Linear) or _is_pointwise(m) for m in inside)
        return ["linear" if flat and not every_conv else "all"]
    if not names:
        raise ValueError(
            f"{type(net).__name__} has no linear or 1x1 layer in blocks: name tuning.targets"
        )
    return list(dict.fromkeys(names))


def _adapted(net: nn.Module, every_conv: bool) -> Iterator[str]:
    in_blocks = block_patterns(net, coarse=True)
    for name, module in net.named_modules():
        if not any(re.match(pattern, name) for pattern in in_blocks):
            continue
        conv = isinstance(module, nn.Conv2d)
        if isinstance(module, nn.Linear) or _is_pointwise(module) or (conv and every_conv):
            yield name


def _is_pointwise(module: nn.Module) -> bool:
    conv = isinstance(module, nn.Conv2d)
    return conv and max(module.kernel_size) == 1 and module.groups == 1


def _glob(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)

"""The backbone inside a tuned network, and the head that its weights were published with."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import nn

from . import embedded
from .blocks import blocks
from .create import build
from .files import classes_in_file
from .pyramid import Wrapper


def encoder(net: nn.Module) -> nn.Module:
    """The timm model inside a task's network, which may be it itself.

    Raises:
        ValueError: There is none.
    """
    while isinstance(net, Wrapper):
        net = net.get_submodule(net.inner)
    if not hasattr(net, "forward_intermediates"):
        raise ValueError(f"{type(net).__name__} is no backbone of timm that gives features")
    return net


def original(name: str, weights: str, like: nn.Module) -> nn.Module:
    """Builds a backbone with the classifier that its weights bring along.

    Args:
        name: A timm model name, see `create`.
        weights: ``"pretrained"``, a path or ``"embedded"``, see `create`.
        like: The same backbone as a task's network has it, for images of its size.

    Raises:
        ValueError: The weights bring no classifier.
    """
    config = get_pretrained_cfg(name) or PretrainedCfg()
    if weights == "pretrained":
        classes = config.num_classes
    else:
        path = embedded.WEIGHTS if weights == "embedded" else Path(weights).expanduser()
        classes = classes_in_file(path, config)
    if not classes:
        raise ValueError(f"the weights of {name} bring no classifier: take head knn or probe")
    size = getattr(getattr(like, "patch_embed", None), "img_size", None)
    return build(name, weights, classes, size)


def keep_head(net: nn.Module) -> None:
    """Frees the memory of an `original`'s blocks, which its ``forward_head`` does without."""
    with suppress(ValueError):  # it has none that timm knows of
        for block in blocks(net).values():
            block.to("meta")

"""Heads: what turns features into predictions, and where a backbone keeps its own."""

from __future__ import annotations

from torch import nn


def classifier_names(net: nn.Module) -> list[str]:
    """The dotted names of a timm model's classifier: two for a distilled DeiT, else one.

    Raises:
        ValueError: If the model has no classifier, as when it was built with ``num_classes=0``.
    """
    if not hasattr(net, "get_classifier"):
        raise ValueError(f"{type(net).__name__} has no get_classifier(): use a timm model")
    found = net.get_classifier()
    heads = {id(head) for head in (found if isinstance(found, tuple) else (found,))}
    names = [
        name
        for name, module in net.named_modules()
        if id(module) in heads and any(True for _ in module.parameters())
    ]
    if not names:
        raise ValueError(f"{type(net).__name__} has no classifier: build it with num_classes >= 1")
    return names

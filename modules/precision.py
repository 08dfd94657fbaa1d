"""A frozen base held in bfloat16, under deltas, norms and heads in float32."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

BaseDtype = Literal["bfloat16"]
LanguageBaseDtype = Literal["bfloat16", "nf4"]  # with a language model


def hold_base(net: nn.Module, dtype: torch.dtype) -> None:
    """Holds what is frozen of linear layers and convolutions in another type, in place.

    These are the layers that autocast computes in bfloat16 anyway, and nearly all of a base.
    Everything else, in which rounding would tell, is then float32, whatever it was read in.

    Args:
        net: A tuned network.
        dtype: The type.
    """
    layers = [module for module in net.modules() if isinstance(module, nn.Linear | _ConvNd)]
    others = [module for module in net.modules() if not isinstance(module, nn.Linear | _ConvNd)]
    # An embedding may be the output layer, too: what comes out of it sets the type of the rest.
    shared = {id(p) for module in others for p in module.parameters(recurse=False)}
    held = {
        id(p)
        for layer in layers
        for p in layer.parameters(recurse=False)
        if not p.requires_grad and id(p) not in shared
    }
    for parameter in net.parameters():
        parameter.data = parameter.data.to(dtype if id(parameter) in held else torch.float32)

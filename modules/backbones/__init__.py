"""Backbones: timm encoders by name, behind a few functions.

Every ConvNeXt and ViT of timm is supported, and others as far as timm's uniform methods carry;
`convnext_shapes` comes with weights inside the package.
"""

from .create import create, normalization
from .pyramid import Pyramid, create_pyramid
from .targets import default_targets, with_targets

__all__ = [
    "Pyramid",
    "create",
    "create_pyramid",
    "default_targets",
    "normalization",
    "with_targets",
]

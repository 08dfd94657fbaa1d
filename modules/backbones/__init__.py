"""Backbones: timm encoders by name, behind four functions.

Every ConvNeXt and ViT of timm is supported, and others as far as timm's uniform methods carry;
`convnext_shapes` comes with weights inside the package.
"""

from .create import create, normalization
from .targets import default_targets

__all__ = ["create", "default_targets", "normalization"]

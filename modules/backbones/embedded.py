"""The tiny ConvNeXt shipped inside the package, pretrained on the Shapes scenes.

Importing this module registers `convnext_shapes` with timm, so that `timm.create_model` builds it
like any other model; `pretrained=True` reads the embedded file and needs no network.
`scripts/pretrain_shapes.py` remakes the weights.
"""

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt

WEIGHTS = Path(__file__).with_name("convnext_shapes.safetensors")

CONVNEXT_SHAPES: dict[str, Any] = {
    "depths": (1, 1, 2, 1),
    "dims": (24, 48, 72, 112),
    "ls_init_value": 1.0,  # blocks that count from the start; the usual 1e-6 is for deep networks
}

# timm reads this name. Classes, input size and normalisation are those of the training.
default_cfgs = generate_default_cfgs(
    {
        "convnext_shapes.embedded": {
            "file": str(WEIGHTS),
            "num_classes": 10,
            "input_size": (3, 64, 64),
            "pool_size": (2, 2),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "first_conv": "stem.0",
            "classifier": "head.fc",
            "license": "apache-2.0",
        }
    }
)


@register_model
def convnext_shapes(pretrained: bool = False, **kwargs: Any) -> ConvNeXt:
    """Build the embedded ConvNeXt: 0.27 M parameters, 64 px, ten kinds of shape."""
    return build_model_with_cfg(
        ConvNeXt,
        "convnext_shapes",
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**CONVNEXT_SHAPES, **kwargs},
    )

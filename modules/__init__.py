"""Fine-tune pretrained vision backbones with N-dimensional low-rank adapters.

Public names are imported when first asked for (PEP 562), so that `import litflora` is instant and
a program that needs the adapter engine alone does not pay for Lightning or timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import adapters as adapters
    from . import backbones as backbones
    from . import callbacks as callbacks
    from . import datamodules as datamodules
    from .adapters import BitFit as BitFit
    from .adapters import DoRA as DoRA
    from .adapters import FLoRA as FLoRA
    from .adapters import Frozen as Frozen
    from .adapters import Full as Full
    from .adapters import LoHa as LoHa
    from .adapters import LoKr as LoKr
    from .adapters import LoRA as LoRA
    from .adapters import MoRA as MoRA
    from .adapters import NormTuning as NormTuning
    from .adapters import PerModule as PerModule
    from .adapters import Probe as Probe
    from .classification import ClassificationModule as ClassificationModule
    from .detection import DetectionModule as DetectionModule
    from .module import TuningModule as TuningModule
    from .module import from_adapter as from_adapter
    from .pretrained_vision_language import (
        PretrainedVisionLanguageModule as PretrainedVisionLanguageModule,
    )
    from .segmentation import SegmentationModule as SegmentationModule
    from .vision_language import VisionLanguageModule as VisionLanguageModule

__version__ = "0.1.0"

_PACKAGES = ("adapters", "backbones", "callbacks", "datamodules")
_HOMES = {
    "ClassificationModule": "classification",
    "DetectionModule": "detection",
    "PretrainedVisionLanguageModule": "pretrained_vision_language",
    "SegmentationModule": "segmentation",
    "TuningModule": "module",
    "VisionLanguageModule": "vision_language",
    "from_adapter": "module",
    **dict.fromkeys(("BitFit", "DoRA", "FLoRA", "Frozen", "Full", "LoHa", "LoKr"), "adapters"),
    **dict.fromkeys(("LoRA", "MoRA", "NormTuning", "PerModule", "Probe"), "adapters"),
}
__all__ = ["__version__", *_PACKAGES, *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

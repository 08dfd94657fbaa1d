"""Datamodules, each imported when first asked for; `base` is there to build your own on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ade20k import ADE20KDataModule as ADE20KDataModule
    from .camvid import CamVidDataModule as CamVidDataModule
    from .cityscapes import CityscapesDataModule as CityscapesDataModule
    from .coco import CocoDataModule as CocoDataModule
    from .coco import CocoFolderDataModule as CocoFolderDataModule
    from .image_folder import ImageFolderDataModule as ImageFolderDataModule
    from .mask_folder import MaskFolderDataModule as MaskFolderDataModule
    from .oxford_pet import OxfordPetTrimapsDataModule as OxfordPetTrimapsDataModule
    from .pennfudan import PennFudanDataModule as PennFudanDataModule
    from .shapes import ShapesDataModule as ShapesDataModule
    from .shapes import ShapesDetectionDataModule as ShapesDetectionDataModule
    from .shapes import ShapesSegmentationDataModule as ShapesSegmentationDataModule
    from .shapes_questions import ShapesQuestionsDataModule as ShapesQuestionsDataModule
    from .vision import VisionDataModule as VisionDataModule
    from .voc import VOCDetectionDataModule as VOCDetectionDataModule
    from .voc import VOCSegmentationDataModule as VOCSegmentationDataModule

_HOMES = {
    "ADE20KDataModule": "ade20k",
    "CamVidDataModule": "camvid",
    "CityscapesDataModule": "cityscapes",
    "CocoDataModule": "coco",
    "CocoFolderDataModule": "coco",
    "ImageFolderDataModule": "image_folder",
    "MaskFolderDataModule": "mask_folder",
    "OxfordPetTrimapsDataModule": "oxford_pet",
    "PennFudanDataModule": "pennfudan",
    "ShapesDataModule": "shapes",
    "ShapesDetectionDataModule": "shapes",
    "ShapesSegmentationDataModule": "shapes",
    "ShapesQuestionsDataModule": "shapes_questions",
    "VOCDetectionDataModule": "voc",
    "VOCSegmentationDataModule": "voc",
    "VisionDataModule": "vision",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

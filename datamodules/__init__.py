"""Datamodules, each imported when first asked for; `base` is there to build your own on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ade20k import ADE20KDataModule as ADE20KDataModule
    from .camvid import CamVidDataModule as CamVidDataModule
    from .cityscapes import CityscapesDataModule as CityscapesDataModule
    from .coco import CocoDataModule as CocoDataModule
    from .coco import CocoFolderDataModule as CocoFolderDataModule
    from .coco_captions import CocoCaptionsDataModule as CocoCaptionsDataModule
    from .image_folder import ImageFolderDataModule as ImageFolderDataModule
    from .llava import LlavaDataModule as LlavaDataModule
    from .mask_folder import MaskFolderDataModule as MaskFolderDataModule
    from .oxford_pet import OxfordPetTrimapsDataModule as OxfordPetTrimapsDataModule
    from .pennfudan import PennFudanDataModule as PennFudanDataModule
    from .science_qa import ScienceQADataModule as ScienceQADataModule
    from .shapes import ShapesDataModule as ShapesDataModule
    from .shapes import ShapesDetectionDataModule as ShapesDetectionDataModule
    from .shapes import ShapesSegmentationDataModule as ShapesSegmentationDataModule
    from .shapes_questions import ShapesQuestionsDataModule as ShapesQuestionsDataModule
    from .vision import VisionDataModule as VisionDataModule
    from .voc import VOCDetectionDataModule as VOCDetectionDataModule
    from .voc import VOCSegmentationDataModule as VOCSegmentationDataModule
    from .vqa import EasyVQADataModule as EasyVQADataModule
    from .vqa import VQARADDataModule as VQARADDataModule
    from .vqa_large import GQADataModule as GQADataModule
    from .vqa_large import VQAv2DataModule as VQAv2DataModule

_HOMES = {
    "ADE20KDataModule": "ade20k",
    "CamVidDataModule": "camvid",
    "CityscapesDataModule": "cityscapes",
    "CocoDataModule": "coco",
    "CocoFolderDataModule": "coco",
    "CocoCaptionsDataModule": "coco_captions",
    "ImageFolderDataModule": "image_folder",
    "LlavaDataModule": "llava",
    "MaskFolderDataModule": "mask_folder",
    "OxfordPetTrimapsDataModule": "oxford_pet",
    "PennFudanDataModule": "pennfudan",
    "ScienceQADataModule": "science_qa",
    "ShapesDataModule": "shapes",
    "ShapesDetectionDataModule": "shapes",
    "ShapesSegmentationDataModule": "shapes",
    "ShapesQuestionsDataModule": "shapes_questions",
    "VisionDataModule": "vision",
    "VOCDetectionDataModule": "voc",
    "VOCSegmentationDataModule": "voc",
    "EasyVQADataModule": "vqa",
    "VQARADDataModule": "vqa",
    "GQADataModule": "vqa_large",
    "VQAv2DataModule": "vqa_large",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Datamodules, each imported when first asked for; `base` is there to build your own on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .image_folder import ImageFolderDataModule as ImageFolderDataModule
    from .shapes import ShapesDataModule as ShapesDataModule
    from .vision import VisionDataModule as VisionDataModule

_HOMES = {
    "ImageFolderDataModule": "image_folder",
    "ShapesDataModule": "shapes",
    "VisionDataModule": "vision",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

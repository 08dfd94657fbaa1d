"""Pictures of samples and of what a model makes of them, drawn with matplotlib; a class a task."""

from .base import Drawing
from .boxes import BoxDrawing
from .labels import LabelDrawing
from .masks import MaskDrawing

__all__ = ["BoxDrawing", "Drawing", "LabelDrawing", "MaskDrawing"]

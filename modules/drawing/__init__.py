"""Pictures of samples and of what a model makes of them, drawn with matplotlib; a class a task."""

from .base import Drawing
from .boxes import BoxDrawing
from .conversations import ConversationDrawing
from .labels import LabelDrawing
from .masks import MaskDrawing

__all__ = ["BoxDrawing", "ConversationDrawing", "Drawing", "LabelDrawing", "MaskDrawing"]

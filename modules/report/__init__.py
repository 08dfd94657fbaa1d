"""The page of a compare, one HTML file that asks the network for nothing, and its tables."""

from .markdown import markdown
from .page import page
from .points import Point, Report, Sweep

__all__ = ["Point", "Report", "Sweep", "markdown", "page"]

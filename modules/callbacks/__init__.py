"""Lightning callbacks: what a run leaves behind, and how it shows its progress."""

from .adapter_folder import AdapterFolder
from .confusion import ConfusionMatrix
from .opening import Opening
from .predictions import PredictionWriter
from .progress import RateProgressBar

__all__ = ["AdapterFolder", "ConfusionMatrix", "Opening", "PredictionWriter", "RateProgressBar"]

"""Lightning callbacks: what a run leaves behind, and how it shows its progress."""

from .adapter_folder import AdapterFolder
from .answers import AnswerWriter
from .batch_size_finder import BatchSizeFinder
from .checkpoints import BestCheckpoint, LastCheckpoint
from .class_table import ClassTable
from .confusion import ConfusionMatrix
from .detections import DetectionWriter
from .ema import EMA
from .gallery import Gallery
from .interruption import Interruption
from .lisa import LISA
from .lr_finder import LearningRateFinder
from .masks import MaskWriter
from .nonfinite import NonFinite
from .opening import Opening
from .predictions import PredictionWriter
from .progress import RateProgressBar
from .rank_budget import RankBudget
from .source_monitor import SourceMonitor
from .spectra import Spectra

__all__ = [
    "EMA",
    "LISA",
    "AdapterFolder",
    "AnswerWriter",
    "BatchSizeFinder",
    "BestCheckpoint",
    "ClassTable",
    "ConfusionMatrix",
    "DetectionWriter",
    "Gallery",
    "Interruption",
    "LastCheckpoint",
    "LearningRateFinder",
    "MaskWriter",
    "NonFinite",
    "Opening",
    "PredictionWriter",
    "RankBudget",
    "RateProgressBar",
    "SourceMonitor",
    "Spectra",
]

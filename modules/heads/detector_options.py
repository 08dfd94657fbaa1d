"""The numbers that torchvision's detectors take, and what they may be."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

_OURS = ("min_size", "max_size")  # these are img_size


def check_options(name: str, detector: type, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that a detector does not take, or a value that is none.

    Args:
        name: What the detector is called.
        detector: torchvision's class.
        options: The numbers by name.
    """
    taken = inspect.signature(detector).parameters.values()
    known = {p.name: p.default for p in taken if isinstance(p.default, (int, float))}
    known = {option: default for option, default in known.items() if option not in _OURS}
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"{name} takes no option {unknown[0]!r}: it takes {', '.join(known)}")
    for option, value in options.items():
        _check(option, value, known[option])
    chosen = known | dict(options)
    for high in (option for option in known if option.endswith("fg_iou_thresh")):
        low = high.replace("fg_iou", "bg_iou")
        if chosen[low] > chosen[high]:
            raise ValueError(f"{low} {chosen[low]} must not be above {high} {chosen[high]}")


def _check(name: str, value: float, default: float) -> None:
    """Counts are 1 or more, a radius is above 0, and all else are shares."""
    if isinstance(default, int):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of 1 or more, not {value}")
    elif name.endswith("radius"):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, not {value}")
    elif not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], not {value}")

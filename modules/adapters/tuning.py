"""What is trained: the one choice that `inject` takes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from .delta import PATHS, Delta, Path, WeightInfo
from .errors import AdapterError

Target = str | type[nn.Module]
Recompute = Literal["pointwise", "none"]


@dataclass
class Parts:
    """Slices of a fused weight that are adapted on their own, along its output mode.

    Attributes:
        of: How many equal parts the weight has, or the size of each part in rows.
        adapt: Which of them get a delta: ``[0, 2]`` of 3 is q and v of a fused qkv.
    """

    of: int | list[int]
    adapt: list[int]


@dataclass
class Tuning:
    """Base class of everything that can stand after ``tuning:``."""

    def to_dict(self) -> dict[str, Any]:
        """The class name and its settings as plain values."""
        return {"class": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(kw_only=True)
class DeltaTuning(Tuning):
    """What every method that adds deltas has in common.

    Attributes:
        dropout: Probability of dropping an input of the delta in training; needs the side path.
        path: "side", "rebuilt", "merged", or "auto" to follow the layer's shape (see `paths`).
        recompute: "pointwise" makes an input that comes from a norm or an activation again in
            backward, "none" keeps it (see `recompute`).
        targets: What gets a delta; None is every linear and pointwise layer (see `targets`).
        exclude: What does not, though a target names it.
        rank_pattern: Ranks of their own for the layers that a pattern names.
        parts: The adapted slices of the fused weights that a pattern names.
    """

    dropout: float = 0.0
    path: Path = "auto"
    recompute: Recompute = "pointwise"
    targets: Target | list[Target] | None = None
    exclude: Target | list[Target] = field(default_factory=list)
    rank_pattern: dict[str, int | list[int]] = field(default_factory=dict)
    parts: dict[str, Parts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_finite(self.dropout, "dropout")
        if not 0.0 <= self.dropout < 1.0:
            raise AdapterError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.path not in PATHS:
            raise AdapterError(f"path must be one of {', '.join(PATHS)}, not {self.path!r}")
        if self.recompute not in get_args(Recompute):
            allowed = " or ".join(map(repr, get_args(Recompute)))
            raise AdapterError(f"recompute must be {allowed}, not {self.recompute!r}")
        if self.dropout > 0 and self.path in ("rebuilt", "merged"):
            raise AdapterError(
                f"dropout acts on the input of the side path: the {self.path} path has none. "
                "Use dropout=0 or path='side'"
            )
        for value in self.rank_pattern.values():
            for rank in value if isinstance(value, list) else [value]:
                check_rank(rank, "rank_pattern")

    def patterns(self) -> dict[str, dict[str, Any]]:
        """The settings that are given by layer-name pattern, by name."""
        return {"rank_pattern": dict(self.rank_pattern), "parts": dict(self.parts)}

    def build(self, info: WeightInfo, overrides: dict[str, Any]) -> Delta:
        """Makes the delta of one weight.

        Args:
            info: The weight.
            overrides: The pattern-given settings that name this layer, by name.
        """
        raise AdapterError(f"{type(self).__name__} is no method: choose FLoRA, LoRA or another")

    def to_dict(self) -> dict[str, Any]:
        """The class name and its settings as plain values; layer types by their names."""

        def plain(target: Any) -> Any:
            return target.__name__ if isinstance(target, type) else target

        settings = super().to_dict()
        for key in ("targets", "exclude"):
            value = settings[key]
            settings[key] = (
                list(map(plain, value)) if isinstance(value, (list, tuple)) else plain(value)
            )
        return settings


def check_finite(value: float, name: str) -> None:
    """Raises unless ``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AdapterError(f"{name} must be a finite number, not {value!r}")


def check_rank(rank: object, name: str = "rank") -> None:
    """Raises unless ``rank`` is a whole number of at least 1."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"{name} must be a whole number of at least 1, not {rank!r}")


def one_rank(method: str, info: WeightInfo, rank: int | list[int]) -> int:
    """The rank of a weight, for a method that has no more than one; raises if given several."""
    if isinstance(rank, (list, tuple)):
        raise AdapterError(f"{method} has one rank a layer: rank_pattern gives {info.name} {rank}")
    return rank

"""PerModule: a tuning of its own for each part of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import AdapterError
from .targets import is_inside
from .tuning import Tuning


@dataclass
class PerModule(Tuning):
    """Each named module is tuned in its own way; all else is frozen.

    All of it is one adapter. The targets and other patterns of a tuning are matched on full names,
    as everywhere, among the layers of its module. A task head is adapted if it is named here.

    Attributes:
        modules: Tunings by the dotted name of their module: ``{"backbone": FLoRA(rank=8), "head":
            LoRA(rank=4)}``.
    """

    modules: dict[str, Tuning]

    def __post_init__(self) -> None:
        if not isinstance(self.modules, dict) or not self.modules:
            raise AdapterError("PerModule needs tunings by module, such as {'head': LoRA()}")
        for name, tuning in self.modules.items():
            if not isinstance(tuning, Tuning) or isinstance(tuning, PerModule):
                raise AdapterError(f"PerModule: {name} needs one tuning, as LoRA(), not {tuning!r}")
            outer = [other for other in self.modules if other != name and is_inside(name, [other])]
            if outer:
                raise AdapterError(f"PerModule: {name} lies in {outer[0]}: give one of them alone")

    def to_dict(self) -> dict[str, Any]:
        """The class name, and the settings of each tuning as plain values."""
        modules = {name: tuning.to_dict() for name, tuning in self.modules.items()}
        return {"class": type(self).__name__, "modules": modules}

"""DenseModule: what the tasks share whose net has a backbone, a neck and a head."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapters import Full, PerModule, Tuning
from .backbones.files import holds_whole_net, load_whole_net
from .classes import ClassesModule


class DenseModule(ClassesModule):
    """A ClassesModule whose backbone, neck and head are tuned each in its own way.

    A task makes its network in ``assemble``. The network has a method ``parts``, which gives the
    names of the modules of its "backbone", "neck" and "head".

    Attributes:
        backbone: Name of the backbone, which a task keeps.
    """

    backbone: str

    def __init__(
        self, neck_tuning: Tuning | None = None, head_tuning: Tuning | None = None, **options: Any
    ) -> None:
        """Checks and keeps what is said of the parts.

        Args:
            neck_tuning: What is trained of the neck; None trains it whole.
            head_tuning: What is trained of the head; None trains it whole.
            options: Arguments of `ClassesModule`.
        """
        super().__init__(**options)
        self.neck_tuning = neck_tuning
        self.head_tuning = head_tuning
        if isinstance(self.tuning, PerModule) and self.part_tunings():
            raise ValueError(
                "tuning is a PerModule: name neck and head in it, not by tunings of their own"
            )

    def assemble(self, weights: str | None) -> nn.Module:
        """Makes the network; ``weights`` are those of its backbone."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        """Makes the network with weights of the backbone or, from a merged file, of all of it."""
        if not holds_whole_net(self.weights):
            self._refuse_random_base()
            return self.assemble(self.weights)
        assert self.weights is not None
        net = self.assemble(None)
        load_whole_net(net, self.weights)
        return net

    def tuning_of(self, net: nn.Module) -> Tuning:
        """One tuning of backbone, neck and head, if they do not train whole."""
        if not self.part_tunings():
            return self.tuning
        modules = dict.fromkeys(net.parts()["backbone"], self.tuning)
        for part, tuning in self.part_tunings().items():
            names = net.parts()[part]
            if not names:
                raise ValueError(f"{self.backbone} has no {part} here: leave {part}_tuning out")
            modules |= dict.fromkeys(names, tuning)
        return PerModule(modules)

    def tunings(self) -> dict[str, Tuning]:
        """That of the backbone, and those of parts."""
        return {**super().tunings(), **self.part_tunings()}

    def part_tunings(self) -> dict[str, Tuning]:
        """The tunings of neck and head, where they were given."""
        asked = {"neck": self.neck_tuning, "head": self.head_tuning}
        return {part: tuning for part, tuning in asked.items() if tuning is not None}

    def _refuse_random_base(self) -> None:
        """Raises if what starts at random would stay so."""
        for part, tuning in self.part_tunings().items():
            if self.adapter is None and not isinstance(tuning, Full):
                raise ValueError(
                    f"{part}_tuning {type(tuning).__name__} keeps the {part}'s base, which is "
                    f"random with weights {self.weights!r}: give weights a file of the whole net "
                    f"as `litflora merge` writes it, or leave {part}_tuning out"
                )

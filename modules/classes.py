"""ClassesModule: what the tasks share whose data have named classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from .adapters import read_config
from .module import TuningModule


class ClassesModule(TuningModule):
    """A TuningModule that tells classes apart.

    Attributes:
        least_classes: How many classes the task makes sense with.
        num_classes: Number of classes.
        class_names: Names of the classes; their numbers if none are given.
    """

    least_classes: ClassVar[int] = 2

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        adapter: str | None = None,
        **options: Any,
    ) -> None:
        """Checks and keeps what is said of the classes.

        Args:
            num_classes: Number of classes, at least ``least_classes``.
            class_names: Names of the classes, in order.
            adapter: Folder of a saved adapter to start from, whose classes must be these.
            options: Arguments of `TuningModule`.
        """
        super().__init__(adapter=adapter, **options)
        if num_classes < self.least_classes:
            least = f"{self.least_classes} class" + "es" * (self.least_classes > 1)
            raise ValueError(f"{self.task} needs at least {least}, not {num_classes}")
        check_length("class_names", class_names, num_classes)
        self.num_classes = num_classes
        self.class_names = _class_names(class_names, num_classes, adapter)

    def setup(self, stage: str) -> None:
        """Takes the data's names where there are numbers so far.

        None may have been given, and some data know theirs only after the first download.
        """
        names = getattr(self.trainer.datamodule, "class_names", None)
        numbers = [name.removeprefix("class ") for name in self.class_names]
        unnamed = numbers == [str(i) for i in range(self.num_classes)]
        if unnamed and names and len(names) == self.num_classes:
            self.class_names = self.hparams["class_names"] = list(names)

    def metadata(self, datamodule: Any = None) -> dict[str, Any]:
        """Adds the names of the classes."""
        return {**super().metadata(datamodule), "class_names": self.class_names}


def check_length(name: str, values: Sequence[Any] | None, num_classes: int) -> None:
    """Raises if there is not one value for each class."""
    if values is not None and len(values) != num_classes:
        raise ValueError(f"{name} has {len(values)} entries, and there are {num_classes} classes")


def _class_names(given: list[str] | None, num_classes: int, adapter: str | None) -> list[str]:
    """The names given, the saved adapter's, or numbers; raises if the first two differ."""
    saved = None if adapter is None else read_config(adapter).get("metadata", {}).get("class_names")
    if given is None and saved is not None and len(saved) == num_classes:
        return saved
    names = given or [str(i) for i in range(num_classes)]
    if saved is not None and saved != names:
        raise ValueError(
            f"adapter {adapter} knows {_shown(saved)}, and the data has {_shown(names)}.\n"
            "Use data with the adapter's classes in its order, or tune anew without an adapter"
        )
    return names


def _shown(names: list[str]) -> str:
    more = ", ..." if len(names) > 4 else ""
    return f"{len(names)} classes ({', '.join(names[:4])}{more})"

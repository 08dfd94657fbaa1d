"""The data of a compare: whether they can be compared on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..train import LitFloraCLI


def check(made: LitFloraCLI, chooses: bool) -> None:
    """Sets the data up as the runs will, so that a mistake shows before the first begins.

    Args:
        made: A model and its data.
        chooses: Whether a rate is to be chosen on the validation data.

    Raises:
        ValueError: If there are no test data, or the same ones choose.
    """
    data = made.datamodule
    if hasattr(made.model, "encoder"):
        data.encoder = made.model.encoder
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    splits = getattr(data, "datasets", {})
    if "test" in splits and not len(splits["test"]):
        raise ValueError("the recipe's data have no test split: a compare ends with one")
    names = [list(getattr(splits.get(split), "names", [split])) for split in ("val", "test")]
    if chooses and names[0] == names[1]:
        raise ValueError(
            "the test split of these data is their validation split, and would choose the rates:\n"
            "give one rate for each tuning, or data with a test split"
        )
    splits.clear()  # the runs set up their own

"""What Lightning's loops need to go on from the end of an epoch."""

from __future__ import annotations

from typing import Any


def mend_epoch_end(loop: dict[str, Any]) -> None:
    """Changes the progress of a fit that is measured in steps, if an epoch had just ended.

    Lightning takes any such fit to have stopped within an epoch, passes through the one that has
    ended once more without a batch, and counts it twice. Here it is told that the next epoch was
    about to start, which it knows how to go on from.

    Args:
        loop: The state of the fit loop in a checkpoint.
    """
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    if epochs["total"]["processed"] != epochs["total"]["ready"]:
        return
    for count in (epochs["total"], epochs["current"]):
        count["completed"] = count["processed"]
        count["ready"] += 1
    # The last batch becomes one whose end was not reached, which Lightning makes up for.
    for count in (batches["total"], batches["current"]):
        count["completed"] -= 1
    batches["is_last_batch"] = False
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1

"""What a run needs, besides its checkpoint, to go on bit for bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer


def seed_batch(*place: int) -> None:
    """Seeds torch, numpy and ``random`` by the place of a batch in a run."""
    seeds = np.random.SeedSequence(place).generate_state(3, np.uint64).tolist()
    torch.manual_seed(seeds[0])
    np.random.seed(seeds[1] % 2**32)
    random.seed(seeds[2])


def step_watching_schedules(trainer: Trainer) -> None:
    """Steps the schedules that watch a metric, as an epoch ends."""
    for config in trainer.lr_scheduler_configs:
        metric = trainer.callback_metrics.get(config.monitor)
        due = (trainer.current_epoch + 1) % config.frequency == 0
        if config.reduce_on_plateau and due and metric is not None:
            config.scheduler.step(metric)


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

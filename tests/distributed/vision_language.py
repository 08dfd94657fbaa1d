"""What two processes do with a model of tower, connector and language model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from litflora import PretrainedVisionLanguageModule, VisionLanguageModule
from litflora.adapters import FLoRA, LoRA
from litflora.callbacks import AdapterFolder
from litflora.datamodules import ShapesQuestionsDataModule
from litflora.datamodules.conversations import IMAGE, Conversation

from . import runs

STRATEGIES = ("ddp", "fsdp2")
METHODS: dict[str, dict[str, Any]] = {
    "FLoRA": {"tuning": FLoRA(rank=2)},
    "LoRA": {"tuning": LoRA(rank=2)},
}
NF4: dict[str, Any] = {"tuning": LoRA(rank=2), "base_dtype": "nf4"}  # which cannot be sharded
CHECKPOINTS = ("llava", "qwen2_vl", "internvl")
CASES = (*METHODS, *CHECKPOINTS)


def module(case: str, base: Path) -> Any:
    if case in CHECKPOINTS:
        options: dict[str, Any] = {**METHODS["FLoRA"], "max_new_tokens": 6, "lr": 1e-2}
        made = PretrainedVisionLanguageModule(str(base), max_length=300, **options)
        made.configure_callbacks = list  # type: ignore[method-assign]  # the others draw galleries
        return made
    return VisionLanguageModule(
        "convnext_shapes",
        str(base),
        weights="embedded",
        img_size=32,
        max_new_tokens=6,
        lr=1e-2,
        **{**METHODS, "NF4": NF4}[case],
    )


class SomeBlind(ShapesQuestionsDataModule):
    """Every second question comes without its image.

    In an evaluation by two processes one has all of the images; in a fit each may have none.
    """

    def split(self, name: str) -> Any:
        made = super().split(name)
        questions = [blind(c) if i % 2 else c for i, c in enumerate(made.conversations)]
        return replace(made, conversations=questions)


def blind(conversation: Conversation) -> Conversation:
    first, *others = conversation.turns
    turns = (replace(first, text=first.text.replace(f"{IMAGE}\n", "")), *others)
    return replace(conversation, turns=turns, images=())


def questions(world: int) -> SomeBlind:
    """Four steps; seven samples to evaluate one by one, so that one process has one more."""
    sizes = {"train_samples": 16, "val_samples": 7, "test_samples": 7}
    batches = {"batch_size": 4 // world, "eval_batch_size": 1}
    return SomeBlind(**sizes, img_size=32, **batches)


class Seeing(Callback):
    """Takes down which steps have images in this process."""

    def __init__(self) -> None:
        self.steps: list[bool] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *args: Any) -> None:
        self.steps.append("pixel_values" in batch or len(batch.get("images", ())) > 0)


def fits(
    bases: Mapping[str, Path], folder: Path, strategies: tuple[str, ...] = STRATEGIES
) -> dict[Any, Any]:
    """What each case leaves: parameters, metrics, answers and the steps that had images."""
    found = {}
    for case, base in bases.items():
        for strategy in strategies:
            begin = time.perf_counter()
            own = folder / case / strategy
            data = questions(1 if strategy == "single" else 2)
            made, seeing = module(case, base), Seeing()
            callbacks = [AdapterFolder(), seeing]
            left, trainer = runs.fit(made, strategy, own, data, callbacks=callbacks)
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            rows = trainer.predict(made, data)
            answers = {
                k: a for row in rows for k, a in zip(row["ids"], row["answers"], strict=True)
            }
            found[case, strategy] = left, metrics, answers, seeing.steps
            print(f"{case} {strategy} took {time.perf_counter() - begin:.1f} s")
    return found

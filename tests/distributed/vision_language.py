"""What two processes do with a model of tower, connector and language model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from litflora import VisionLanguageModule
from litflora.adapters import FLoRA, LoRA
from litflora.callbacks import AdapterFolder
from litflora.datamodules import ShapesQuestionsDataModule

from . import runs

STRATEGIES = ("ddp", "fsdp2")
METHODS = {"FLoRA": {"tuning": FLoRA(rank=2)}, "LoRA": {"tuning": LoRA(rank=2)}}
NF4 = {"NF4": {"tuning": LoRA(rank=2), "base_dtype": "nf4"}}  # which cannot be sharded


def module(language: Path, method: str) -> VisionLanguageModule:
    return VisionLanguageModule(
        "convnext_shapes",
        str(language),
        weights="embedded",
        img_size=32,
        max_new_tokens=6,
        lr=1e-2,
        **{**METHODS, **NF4}[method],
    )


def questions(world: int) -> Any:
    """Three steps; seven samples to evaluate one by one, so that one process has one more."""
    sizes = {"train_samples": 12, "val_samples": 7, "test_samples": 7}
    batches = {"batch_size": 4 // world, "eval_batch_size": 1}
    return ShapesQuestionsDataModule(**sizes, img_size=32, **batches)


def fits(
    language: Path,
    folder: Path,
    strategies: tuple[str, ...] = STRATEGIES,
    methods: Iterable[str] = METHODS,
) -> dict[Any, Any]:
    found = {}
    for method in methods:
        for strategy in strategies:
            own = folder / method / strategy
            data = questions(1 if strategy == "single" else 2)
            made = module(language, method)
            left, trainer = runs.fit(made, strategy, own, data, callbacks=[AdapterFolder()])
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            rows = trainer.predict(made, data)
            answers = {
                k: a for row in rows for k, a in zip(row["ids"], row["answers"], strict=True)
            }
            found[method, strategy] = left, metrics, answers
    return found

"""The support matrix of docs/scaling.md: every task with every tuning, strategy and precision."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from litflora import (
    ClassificationModule,
    DetectionModule,
    SegmentationModule,
    VisionLanguageModule,
    from_adapter,
)
from litflora.adapters import FLoRA, Full, LoRA, Probe, Tuning
from litflora.callbacks import AdapterFolder
from litflora.datamodules import (
    ShapesDataModule,
    ShapesDetectionDataModule,
    ShapesQuestionsDataModule,
    ShapesSegmentationDataModule,
)
from litflora.language.tiny import byte_tokenizer, tiny_language_model

from . import runs

TASKS = ("classification", "segmentation", "detection", "vision_language")
TUNINGS: dict[str, Tuning] = {
    "Full": Full(),
    "Probe": Probe(),
    "LoRA": LoRA(rank=4),
    "FLoRA": FLoRA(rank=4),
}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
LANGUAGE = "language"
Cell = tuple[str, str, str, str]

NET = {"backbone": "convnext_shapes", "num_classes": 10, "weights": "embedded", "img_size": 64}
DENSE = {**NET, "head_width": 16}
FEW = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 5, "box_detections_per_img": 5}
SAMPLES = {"domain": "source", "train_samples": 8, "val_samples": 3, "test_samples": 3}
SMALL = {**SAMPLES, "img_size": 64, "batch_size": 2}
SHORT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}


@dataclass(frozen=True)
class Result:
    """What came of a cell in one process.

    Attributes:
        refused: The error's text, if it was refused.
        losses: The loss of each step.
        trained: How many parameters train.
        moved: How many of these have moved, and of the frozen ones.
        digest: Of all parameters in the end.
    """

    refused: str = ""
    losses: tuple[float, ...] = ()
    trained: int = 0
    moved: tuple[int, int] = (0, 0)
    digest: str = ""


def cells(*strategies: str) -> list[Cell]:
    """Task, tuning, strategy and precision of each cell."""
    return list(product(TASKS, TUNINGS, strategies, PRECISIONS))


def some(*strategies: str) -> list[Cell]:
    """A third of the cells: every task with every tuning, and either with every precision."""

    def place(cell: Cell) -> int:
        task, tuning, _, precision = cell
        return TASKS.index(task) + list(TUNINGS).index(tuning) + PRECISIONS.index(precision)

    return [cell for cell in cells(*strategies) if place(cell) % len(PRECISIONS) == 0]


def save_language(folder: Path) -> None:
    """Writes the language model that cells in a folder start from."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_language_model(SHORT).save_pretrained(folder / LANGUAGE)
    byte_tokenizer().save_pretrained(folder / LANGUAGE)


def run(cell: Cell, folder: Path) -> Result:
    """Trains two steps, evaluates, leaves an adapter and reads it again.

    Args:
        cell: The cell.
        folder: Where files go, and where `save_language` has left its.
    """
    task, tuning, strategy, precision = cell
    made, data = _made(task, TUNINGS[tuning], folder)
    made.configure_callbacks = list  # a gallery takes longer than all else
    own = folder / "-".join(cell)
    options = {"precision": precision, "callbacks": [AdapterFolder()], "limit_train_batches": 2}
    try:
        left, trainer = runs.fit(made, strategy, own, data, **options)
    except ValueError as error:
        return Result(refused=str(error))
    assert made.monitor in trainer.callback_metrics
    if trainer.world_size > 1:
        dist.barrier()  # the first process writes
    again = from_adapter(own / "adapter")
    again.configure_model()
    saved = {n: p for n, p in again.named_parameters() if p.requires_grad}
    assert saved.keys() == left.trained
    for name, value in saved.items():
        assert value.equal(left.end[name].to(value.dtype)), name
    whole = hashlib.sha256()
    for name, value in left.end.items():
        whole.update(name.encode() + value.float().numpy().tobytes())
    return Result(
        losses=tuple(left.losses),
        trained=len(left.trained),
        moved=(len(left.moved & left.trained), len(left.moved - left.trained)),
        digest=whole.hexdigest(),
    )


def _made(task: str, tuning: Tuning, folder: Path) -> tuple[Any, Any]:
    if task == "classification":
        uneven = {**SMALL, "val_samples": 5}  # two batches to evaluate for the one, and one
        return ClassificationModule(**NET, tuning=tuning), ShapesDataModule(**uneven)
    if task == "vision_language":
        small = {"weights": "embedded", "img_size": 32, "max_new_tokens": 2, "lr": 1e-2}
        language = str(folder / LANGUAGE)
        made: Any = VisionLanguageModule("convnext_shapes", language, tuning=tuning, **small)
        return made, ShapesQuestionsDataModule(**{**SMALL, "img_size": 32, "eval_batch_size": 1})
    if task == "segmentation":
        net = {**DENSE, "num_classes": 11, "head": "segformer"}
        made = SegmentationModule(**net, tuning=tuning)
        return made, ShapesSegmentationDataModule(**SMALL, eval_batch_size=1)
    made = DetectionModule(**DENSE, detector_options=FEW, tuning=tuning)
    return made, ShapesDetectionDataModule(**SMALL, eval_batch_size=1)


def works(result: Result) -> bool:
    """Whether a cell trained as it should: finite losses, and nothing frozen has moved."""
    trains = all(map(isfinite, result.losses)) and result.moved[0] > 0 and result.moved[1] == 0
    return not result.refused and len(result.losses) == 2 and trains


def table(results: dict[Cell, Result]) -> str:
    """The matrix in Markdown, with what is refused below it."""
    strategies = tuple(dict.fromkeys(cell[2] for cell in results))
    notes = list(dict.fromkeys(r.refused for r in results.values() if r.refused))
    columns = [f"{s} {p}" for s, p in product(strategies, PRECISIONS)]
    lines = ["| task | tuning | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for task, tuning in product(TASKS, TUNINGS):
        marks = []
        for strategy, precision in product(strategies, PRECISIONS):
            result = results[task, tuning, strategy, precision]
            mark = "yes" if works(result) else "fails"
            marks.append(f"({1 + notes.index(result.refused)})" if result.refused else mark)
        lines.append(f"| {task} | {tuning} | " + " | ".join(marks) + " |")
    told = [f"({number}) refused: `{note}`" for number, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *told])


def in_docs(text: str) -> str:
    """The matrix as it stands in a page."""
    found = re.search(r"^\| task \| tuning \|.*?(?=\n\n(?!\()|\Z)", text, re.S | re.M)
    return found[0].strip() if found else ""


def told(text: str) -> dict[Cell, str]:
    """What a matrix in Markdown says of each cell: "yes", or the text of the refusal."""
    heads, *rows = re.findall(r"^\| (.*) \|$", text, re.M)
    columns = [head.split() for head in heads.split(" | ")[2:]]
    notes = dict(re.findall(r"^(\(\d+\)) refused: `(.*?)`$", text, re.M | re.S))
    found = {}
    for row in rows:
        task, tuning, *marks = row.split(" | ")
        for (strategy, precision), mark in zip(columns, marks, strict=True):
            found[task, tuning, strategy, precision] = notes.get(mark, mark)
    return found

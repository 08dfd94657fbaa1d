"""AnswerWriter: the answers to the questions of a prediction."""

from __future__ import annotations

import json
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..adapters.replacing import replacing
from ..processes import gathered
from ._files import log_dir


class AnswerWriter(Callback):
    """Writes ``answers.jsonl`` into the log folder at the end of predict.

    Each line is an object with ``id``, ``question``, ``answer``, and ``image``: the file, a list of
    them if there are several, null if the image came from none. Lines are in the order of the data.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets earlier answers."""
        self.rows = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps a batch's questions and answers."""
        columns = (outputs[key] for key in ("ids", "questions", "answers", "files"))
        self.rows += [
            {"id": own, "question": question, "answer": answer, "image": _image(files)}
            for own, question, answer, files in zip(*columns, strict=True)
        ]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the rows of all processes."""
        path = log_dir(trainer) / "answers.jsonl"
        rows = gathered(self.rows)
        if trainer.fast_dev_run or not trainer.is_global_zero:
            return
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"{len(rows)} answers are in {path}")


def _image(files: tuple[str, ...]) -> str | list[str] | None:
    return list(files) if len(files) > 1 else next(iter(files), None)

"""DetectionWriter: predicted objects, as COCO's results and as pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchvision.ops import box_convert

from ..adapters.replacing import replacing
from ..drawing import BoxDrawing
from ..drawing.boxes import LEAST_SCORE
from ..processes import interleaved
from ._files import log_dir, picture_path


class DetectionWriter(Callback):
    """Writes ``predictions.json`` and ``predictions/<image>.png`` into the log folder.

    The JSON is a list of results as COCO defines them: image_id, category_id, bbox as [x, y, width,
    height] in pixels, score and, where there are masks, segmentation as a compressed run-length
    code; each also has the image's file_name, as its picture is called. Ids are the datamodule's
    ``image_ids`` and ``category_ids``; without them an image has its name, and the classes count
    from 1. The pictures, ``a.jpg.png`` of a.jpg, show the likely ones.
    """

    file: TextIO | None = None
    drawing: BoxDrawing | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens this process's part of the results: masks of many images fit into no memory."""
        self.folder = log_dir(trainer)
        if trainer.fast_dev_run:
            return
        data, names = trainer.datamodule, pl_module.class_names
        self.image_ids = getattr(data, "image_ids", {})
        # Of images to predict alone, nobody knows the classes' ids.
        self.category_ids = getattr(data, "category_ids", None) or range(1, len(names) + 1)
        if find_spec("matplotlib") is None:
            rank_zero_warn("no predictions are drawn: pip install 'litflora[plots]'")
        else:
            self.drawing = BoxDrawing(names, getattr(data, "palette", ()))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = _part(self.folder, trainer.global_rank).open("w", buffering=1)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes and draws the objects of a batch."""
        if self.file is None:
            return
        for image, name, found in zip(batch[0], outputs["names"], outputs["found"], strict=True):
            found = {key: value.cpu() for key, value in found.items()}
            path = picture_path(trainer.datamodule, self.folder, name)
            own = {"file_name": str(path.relative_to(self.folder / "predictions").with_suffix(""))}
            items = results(self.image_ids.get(name, name), self.category_ids, found)
            self.file.write(json.dumps([item | own for item in items]) + "\n")
            if self.drawing is not None:
                figure = self.drawing.picture(image.cpu(), found)
                with replacing(path, durable=False) as temporary:
                    figure.savefig(temporary, pil_kwargs={"compress_level": 1})  # twice as fast

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Joins the parts of all processes."""
        if self.file is None:
            return
        self.file.close()
        self.file = None
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            path = self.folder / "predictions.json"
            parts = [_part(self.folder, rank) for rank in range(trainer.world_size)]
            count = _join(parts, path)
            print(f"{count} predicted objects are in {path}")
            if self.drawing is not None:
                print(
                    f"those of a score of {LEAST_SCORE} or more are drawn in {path.with_suffix('')}"
                )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leaves no part behind."""
        if self.file is not None:
            self.file.close()
            self.file = None
            _part(self.folder, trainer.global_rank).unlink(missing_ok=True)


def results(
    image_id: int | str, category_ids: Sequence[int], found: dict[str, Tensor]
) -> Iterator[dict[str, Any]]:
    """COCO's results of one image.

    Args:
        image_id: The image's.
        category_ids: Of each class.
        found: ``boxes`` ``[n, 4]`` in XYXY, ``labels``, ``scores``, and maybe ``masks``.
    """
    boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
    labels, scores = found["labels"].tolist(), found["scores"].tolist()
    codes = _run_lengths(found["masks"]) if "masks" in found else None
    for place, (box, label, score) in enumerate(zip(boxes, labels, scores, strict=True)):
        segmentation = {} if codes is None else {"segmentation": codes[place]}
        yield {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [round(value, 3) for value in box],
            "score": round(score, 6),
            **segmentation,
        }


def _run_lengths(masks: Tensor) -> list[dict[str, Any]]:
    """The compressed run-length code of each mask ``[n, H, W]``."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ImportError(
            "masks are written by faster-coco-eval: pip install 'litflora[dense]'"
        ) from error
    by_column = np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))
    return [{**code, "counts": code["counts"].decode()} for code in mask.encode(by_column)]


def _part(folder: Path, rank: int) -> Path:
    return folder / f".predictions.{rank}.jsonl"


def _join(parts: list[Path], path: Path) -> int:
    """Makes one JSON list of files with a list a line, deletes them, and counts the items."""
    count = 0
    with replacing(path) as temporary, temporary.open("w") as whole, ExitStack() as stack:
        whole.write("[")
        files = [stack.enter_context(part.open()) for part in parts]
        for line in interleaved(files):
            for item in json.loads(line):
                whole.write((",\n" if count else "\n") + json.dumps(item))
                count += 1
        whole.write("\n]\n")
    for part in parts:
        part.unlink()
    return count

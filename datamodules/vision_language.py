"""Visual instruction tuning: what all datamodules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2.functional import pil_to_tensor

from .base import SeededDataset, TuningDataModule, check_at_least
from .conversations import Conversation
from .dense import read_photo
from .length_groups import LengthGroupedSampler, lengths_of
from .samplers import KeySampler


@dataclass
class Conversations(SeededDataset):
    """Conversations with their images read, each as `Conversation`."""

    conversations: Sequence[Conversation]
    names: Sequence[str]
    transform: Callable[[Any], Any] | None = None
    seed: int = 0

    def __getitem__(self, key: int) -> Conversation:
        asked = self.conversations[key % len(self)]
        files = tuple(str(image) for image in asked.images if not isinstance(image, torch.Tensor))
        try:
            images = tuple(map(read_image, asked.images))
        except ValueError as reason:
            raise ValueError(f"conversation {asked.id}: {reason}") from reason
        return self._transformed(replace(asked, images=images, files=files), key)


def read_image(image: str | Path | torch.Tensor) -> torch.Tensor:
    """An image file as uint8 ``[3, H, W]``; what has been read already stays as it is."""
    return image if isinstance(image, torch.Tensor) else pil_to_tensor(read_photo(Path(image)))


class VisionLanguageDataModule(TuningDataModule):
    """Loaders over the `Conversations` that a subclass gives for each split.

    The model's encoder makes batches of them: a datamodule knows no tokens. Evaluation is about the
    last answer of each conversation alone.

    Args:
        batch_size: Conversations in a training batch of one process.
        eval_batch_size: Conversations in any other batch.
        num_workers: Processes that load; they change the speed and never the batches.
        seed: Decides all that is random in the data.
        group_by_length: Train on batches of conversations that are alike in length, all with images
            or all without; see `LengthGroupedSampler`.
        pack: Put several conversations of a training batch into one row, none of which sees
            another: less padding.

    Attributes:
        encoder: Writes conversations in tokens; None takes that of the Trainer's module.
    """

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        seed: int,
        group_by_length: bool = False,
        pack: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        check_at_least("eval_batch_size", eval_batch_size, 1)
        self.eval_batch_size = eval_batch_size
        self.group_by_length = group_by_length
        self.pack = pack
        self.class_names: list[str] = []
        self.encoder: Any = None

    def split(self, name: str) -> Conversations:
        """All conversations of the split "train", "val", "test" or "predict"."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Takes the model's encoder, and makes the splits that a stage needs, once."""
        if self.encoder is None and self.trainer is not None:
            self.encoder = self.trainer.lightning_module.encoder
        super().setup(stage)

    def collate(self, name: str) -> Callable[[list[Conversation]], Any]:
        """The encoder's batches for training, evaluation or prediction."""
        if self.encoder is None:
            raise ValueError(
                f"{type(self).__name__} needs the encoder of a model: set .encoder, or fit with a "
                "Trainer"
            )
        if name == "train" and self.pack and not hasattr(self.encoder, "packed_batch"):
            raise ValueError(f"pack: {type(self.encoder).__name__} cannot pack; set pack: false")
        train = "packed_batch" if self.pack else "train_batch"
        kinds = {"train": train, "predict": "predict_batch"}
        return getattr(self.encoder, kinds.get(name, "eval_batch"))

    def contents(self) -> str:
        """The sizes of the splits that are set up, for a person to read."""
        kinds = {"train": "conversations"}
        sizes = {name: f"{len(samples):,} {name}" for name, samples in self.datasets.items()}
        return ", ".join(f"{size} {kinds.get(name, 'questions')}" for name, size in sizes.items())

    def _sampler(self, options: dict[str, Any]) -> KeySampler:
        if not self.group_by_length:
            return super()._sampler(options)
        lengths, images = self._lengths
        return LengthGroupedSampler(lengths, images, self.batch_size, **options)

    @cached_property
    def _lengths(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        return lengths_of(self.datasets["train"].conversations)

    @property
    def _eval_batch_size(self) -> int:
        return self.eval_batch_size

"""Training batches of conversations that are alike: in length, and in whether they have images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .conversations import IMAGE, Conversation
from .samplers import KeySampler

IMAGE_LENGTH = 576  # what an image counts as in words: the patches of LLaVA-1.5's tower
MEGABATCH = 50  # batches whose samples are sorted together, as transformers' Trainer does


def lengths_of(conversations: Sequence[Conversation]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """How long conversations are, in words and without a tokenizer, and which have images."""
    counted = [_length(conversations[index]) for index in range(len(conversations))]
    lengths, images = np.array(counted, np.int32).reshape(-1, 2).T
    return lengths + IMAGE_LENGTH * images, images > 0


def _length(conversation: Conversation) -> tuple[int, int]:
    words = sum(len(turn.text.replace(IMAGE, " ").split()) for turn in conversation.turns)
    return words, len(conversation.images)


class LengthGroupedSampler(KeySampler):
    """Hands out keys so that each batch holds samples of like length, with images or without.

    As in LLaVA's training (Liu et al., arXiv:2310.03744), all processes take a batch of the same
    kind at the same time: none waits for another that runs the vision tower, or has longer texts.
    Samples of a kind are shuffled, sorted by length within megabatches and cut into batches, whose
    order is shuffled. To make whole batches, as many samples of each kind as are missing come twice
    (or more often, where the kind has fewer than a batch).

    Args:
        lengths: Of each sample, ``[n]``.
        images: Whether each sample has images, ``[n]``.
        batch_size: Samples in a batch of one process.
        options: `num_replicas`, `rank` and `seed` of DistributedSampler.
    """

    def __init__(
        self,
        lengths: NDArray[Any],
        images: NDArray[np.bool_],
        batch_size: int,
        *,
        num_replicas: int,
        **options: Any,
    ) -> None:
        self.lengths = lengths
        self.chunk = batch_size * num_replicas
        kinds = (np.flatnonzero(images), np.flatnonzero(~images))
        self.kinds = [members for members in kinds if len(members)]
        total = sum(map(self._whole, self.kinds))
        super().__init__(range(total), num_replicas=num_replicas, **options)  # type: ignore[arg-type]

    def keys(self) -> Iterable[int]:
        """Each sample once, or more often to make whole batches."""
        start = self.epoch * len(self.lengths)
        return (start + index for index in self._order()[self.rank :: self.num_replicas].tolist())

    def _whole(self, members: NDArray[np.intp]) -> int:
        return -(-len(members) // self.chunk) * self.chunk

    def _order(self) -> NDArray[np.intp]:
        rng = np.random.default_rng((self.seed, self.epoch))
        batches = np.concatenate([self._batches(members, rng) for members in self.kinds])
        return rng.permutation(batches).ravel()

    def _batches(self, members: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
        """The batches of all processes together: ``[batches, chunk]``."""
        drawn = np.resize(rng.permutation(members), self._whole(members))
        mega = MEGABATCH * self.chunk
        parts = np.split(drawn, range(mega, len(drawn), mega))
        ordered = [part[np.argsort(self.lengths[part], kind="stable")] for part in parts]
        return np.concatenate(ordered).reshape(-1, self.chunk)

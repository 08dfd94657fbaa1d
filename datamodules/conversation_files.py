"""Conversations about image files: their splits, folders to predict, and images that are bad."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Subset

from .conversations import ASSISTANT, IMAGE, USER, Conversation, Turn
from .dense import read_photo
from .dense_files import each
from .images import check_splitting, images_to_predict
from .splits import hold_out_groups, linked
from .vision_language import Conversations, VisionLanguageDataModule

Read = Callable[[], Sequence[Conversation]]
SHOWN = 5  # so many bad images are named


class ConversationFilesDataModule(VisionLanguageDataModule):
    """Conversations about image files; a subclass tells how each split is read.

    A missing validation split is held out from training by the seed, all conversations that share
    an image together; validation stands in for a missing test split. Conversations to predict are
    those of the test split without their answers, if there are no others. An evaluation asks for
    every answer, after all that was said before it.

    Args:
        root: The data set's own folder.
        batch_size: Conversations in a training batch of one process.
        eval_batch_size: Conversations in any other batch.
        num_workers: Processes that load; they change the speed and never the batches.
        seed: Decides a held out split and order.
        val_fraction: Share of the training images held out if there is no validation split.
        on_bad_image: ``raise`` names the conversations whose images are missing before the stage
            begins, and one whose image is broken when it comes; ``skip`` leaves both out, and reads
            every image once for it, before the stage begins.
        predict_root: Folder of images to predict, with any folders inside; the ``question`` is
            asked about each. With it, ``root`` may be missing.
        question: What to ask about the images of ``predict_root``.
        group_by_length: Train on batches of conversations that are alike in length, all with images
            or all without.
        pack: Put several conversations of a training batch into one row, none of which sees
            another.
    """

    # What a question ends with, so that the answer is of the form that the data set wants.
    ending: ClassVar[str] = ""

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        on_bad_image: str = "raise",
        predict_root: str | None = None,
        question: str | None = None,
        group_by_length: bool = False,
        pack: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, group_by_length, pack)
        check_splitting(val_fraction, predict_root)
        if on_bad_image not in ("raise", "skip"):
            raise ValueError(f"on_bad_image {on_bad_image!r} is neither raise nor skip")
        if (predict_root is None) != (question is None):
            raise ValueError("predict_root and question go together: give both, or none")
        if predict_root is None and not (root and Path(root).is_dir()):
            raise FileNotFoundError(f"data root {root} is no folder (set data.init_args.root)")
        self.root = Path(root or "")
        self.val_fraction = val_fraction
        self.on_bad_image = on_bad_image
        self.predict_root = predict_root
        self.question = question
        self._found: dict[str, Sequence[Conversation]] = {}
        self._left_out: dict[str, int] = {}

    @abstractmethod
    def sources(self) -> Mapping[str, Read]:
        """What reads each split that the data set has."""

    def split(self, name: str) -> Conversations:
        """All conversations of a split whose images are there."""
        found = self._conversations(name)
        known = [(conversation.id, conversation.images) for conversation in _in_order(found)]
        flaws = self._flaws({path: None for _, paths in known for path in paths})
        left = [i for i, (_, paths) in enumerate(known) if flaws.keys().isdisjoint(paths)]
        if len(left) < len(known):
            bad = [(own, path) for own, paths in known for path in paths if path in flaws]
            named = [f"conversation {own}: {flaws[path]}" for own, path in bad[:SHOWN]]
            more = [f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
            count = len(known) - len(left)
            said = f"{count} of {len(known)} conversations ({name}) have bad images"
            self._tell(said, "; ".join([*named, *more]), everything=not left)
            self._left_out[name] = count
            found = Subset(found, left)  # type: ignore[arg-type, assignment]  # needs no Dataset
        if name == "train":
            return Conversations(found, [known[i][0] for i in left], seed=self.seed)
        asked = EachAnswer(found)
        if name == "predict":
            return Conversations(Unanswered(asked), asked.ids, seed=self.seed)
        return Conversations(asked, asked.ids, seed=self.seed)

    def contents(self) -> str:
        """The sizes of the splits that are set up, and how many conversations are left out."""
        stands_in = "test" in self.datasets and "test" not in self.sources()
        instead = ", of the validation set since there is no other" if stands_in else ""
        left_out = [f"{count:,} {name}" for name, count in self._left_out.items()]
        said = f", {', '.join(left_out)} left out for bad images" if left_out else ""
        return super().contents() + instead + said

    def _conversations(self, name: str) -> Sequence[Conversation]:
        if name == "predict" and self.predict_root is not None:
            folder = Path(self.predict_root)
            paths = images_to_predict(self.predict_root)
            return [self._asked(path.relative_to(folder).as_posix(), path) for path in paths]
        if name == "predict":
            return self._split("predict" if "predict" in self.sources() else "test")
        return self._split(name)

    def _split(self, name: str) -> Sequence[Conversation]:
        if name not in self._found:
            self._found |= self._read(name)
        return self._found[name]

    def _read(self, name: str) -> dict[str, Sequence[Conversation]]:
        """A split as the data set has it, or made of another one."""
        sources = self.sources()
        if name == "train" and name in sources and "val" not in sources:
            return self._held_out(sources[name]())
        if name in sources:
            return {name: sources[name]()}
        if name == "test":
            return {name: self._split("val")}
        if "train" not in sources:
            raise ValueError(f"there are no conversations for {name}: give a file of them")
        return self._read("train")

    def _held_out(self, found: Sequence[Conversation]) -> dict[str, Sequence[Conversation]]:
        groups, sizes = linked(each.images or (each.id,) for each in _in_order(found))
        if len(sizes) < 2:
            raise ValueError(
                "cannot hold out validation: all conversations are about one image, or linked by "
                "images that they share: give validation a file of its own (val_file)"
            )
        held = hold_out_groups(sizes, self.val_fraction, self.seed)
        parts: dict[str, list[int]] = {"train": [], "val": []}
        for index, group in enumerate(groups):
            parts["val" if group in held else "train"].append(index)
        return {name: Subset(found, indices) for name, indices in parts.items()}  # type: ignore[arg-type, misc]

    def _asked(self, own: str, path: Path) -> Conversation:
        turn = Turn(USER, f"{IMAGE}\n{self.question}{self.ending}")
        return Conversation(own, (turn,), (path,))

    def _flaws(self, paths: Mapping[Any, None]) -> dict[Any, str]:
        """What is wrong with images, by their paths; broken ones are found only to skip them."""
        if self.on_bad_image == "raise":
            return {path: f"no image {path}" for path in paths if not os.path.isfile(path)}
        found = zip(paths, each(_flaw, list(paths), "Reading all images"), strict=True)
        return {path: flaw for path, flaw in found if flaw}

    def _tell(self, said: str, named: str, everything: bool) -> None:
        if self.on_bad_image == "raise":
            remedy = "set data.init_args.root right, or on_bad_image: skip to leave them out"
            raise FileNotFoundError(f"{said}: {remedy}\n{named}")
        if everything:
            raise ValueError(f"{said}: none is left\n{named}")
        rank_zero_warn(f"{said} and are left out: {named}")


class EachAnswer(Sequence[Conversation]):
    """Conversations up to each of their answers, or to the question that they end with.

    Attributes:
        ids: Those of the conversations that they are from.
    """

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self.conversations = conversations
        self.places: list[tuple[int, int]] = []
        self.ids: list[str] = []
        for index, conversation in enumerate(_in_order(conversations)):
            places = conversation.asks()
            self.places += [(index, place) for place in places]
            self.ids += [conversation.id] * len(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        conversation, place = self.places[index]
        return self.conversations[conversation].until(place)


class Unanswered(Sequence[Conversation]):
    """Conversations without their last answers."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: Any) -> Any:
        found = self.conversations[index]
        return found.question() if found.turns[-1].role == ASSISTANT else found


def _in_order(found: Sequence[Conversation]) -> Any:
    return (found[index] for index in range(len(found)))


def _flaw(path: Path) -> str | None:
    try:
        read_photo(path)
    except ValueError as reason:
        return str(reason)
    return None

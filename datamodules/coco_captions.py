"""COCO's captions: five sentences about each photo."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from .coco_columns import Content, column, ids_of, read_content
from .conversation_files import ConversationFilesDataModule, Read
from .questions import Question, Questions

PROMPT = "Provide a one-sentence caption for the provided image."


class CocoCaptionsDataModule(ConversationFilesDataModule):
    """Captions of COCO 2017 (Chen et al., arXiv:1504.00325).

    `root` holds `train2017/`, `val2017/` and `annotations/captions_{train,val}2017.json`. Each
    caption is learnt on its own; in evaluation a photo comes once, and all its captions count as
    right. Validation stands in for the test split.
    """

    def sources(self) -> Mapping[str, Read]:
        """The splits "train" and "val"."""
        return {name: partial(self._captions, name) for name in ("train", "val")}

    def _captions(self, name: str) -> Questions:
        path = self.root / f"annotations/captions_{name}2017.json"
        content = read_content(path, "captions", ("images", "annotations"))
        try:
            found = _questions(content, apart=name == "train")
        except ValueError as reason:
            raise ValueError(f"{path}: {reason}") from reason
        return Questions(found, self.root / f"{name}2017", self.ending)


def _questions(content: Content, apart: bool) -> list[Question]:
    """A question for each caption, or one for each photo that has some."""
    names = column(content, "images", "file_name", str)
    files = dict(zip(ids_of(content, "images"), names, strict=True))
    captions: dict[int, list[str]] = {own: [] for own in files}
    owners = column(content, "annotations", "image_id", int)
    for owner, text in zip(owners, column(content, "annotations", "caption", str), strict=True):
        if owner not in captions:
            raise ValueError(f"a caption has the image_id {owner}, and no image has this id")
        captions[owner].append(text.strip())
    if not apart:
        return [
            Question(str(own), PROMPT, texts[0], files[own], tuple(texts))
            for own, texts in captions.items()
            if texts
        ]
    return [
        Question(f"{own}/{number}", PROMPT, text, files[own])
        for own, texts in captions.items()
        for number, text in enumerate(texts)
    ]

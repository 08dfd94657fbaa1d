"""Questions about drawn scenes: visual instruction tuning with no download."""

from __future__ import annotations

import numpy as np

from .conversations import ASSISTANT, IMAGE, USER, Conversation, Turn
from .scenes import SceneObject
from .shapes import counts_of, draw, pictures
from .vision_language import Conversations, VisionLanguageDataModule

SHARES = (0.35, 0.35, 0.15, 0.15)  # of the kinds of questions


class ShapesQuestionsDataModule(VisionLanguageDataModule):
    """Scenes of coloured shapes, with one question each about the largest of them.

    Questions ask for its kind, its colour, and in which half it is. Scene and question `index` of a
    split follow from the seed alone.

    Args:
        domain: "source" or "shifted", see `ShapesDataModule`.
        train_samples: Training scenes.
        val_samples: Validation scenes.
        test_samples: Test scenes.
        img_size: Side of the images in pixels.
        batch_size: Conversations in a training batch of one process.
        eval_batch_size: Conversations in any other batch.
        num_workers: Processes that load; the images are drawn once and kept, so 0 does well.
        seed: Decides the scenes, the questions and their order.
        blank: Show grey in place of the scenes: what can be answered without looking.
    """

    def __init__(
        self,
        domain: str = "source",
        train_samples: int = 4000,
        val_samples: int = 500,
        test_samples: int = 1000,
        img_size: int = 64,
        batch_size: int = 50,
        eval_batch_size: int = 100,
        num_workers: int = 0,
        seed: int = 0,
        blank: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        self.counts = counts_of(domain, img_size, train_samples, val_samples, test_samples)
        self.domain = domain
        self.img_size = img_size
        self.blank = blank

    def split(self, name: str) -> Conversations:
        """Draw all scenes of a split; prediction takes those of the test split."""
        scenes, names = draw(self.seed, name, self.counts)
        images = pictures(scenes, self.img_size, self.domain)
        if self.blank:
            images = images.new_full((), 127).expand_as(images)
        made = []
        for scene, image, own in zip(scenes, images, names, strict=True):
            rng = np.random.default_rng((self.seed, scene.seed))
            question, answer, closed = ask(scene.main, rng)
            turns = (Turn(USER, f"{IMAGE}\n{question}"), Turn(ASSISTANT, answer))
            turns = turns[:1] if name == "predict" else turns
            made.append(Conversation(own, turns, (image,), closed=closed))
        return Conversations(made, names)


def ask(thing: SceneObject, rng: np.random.Generator) -> tuple[str, str, bool]:
    """A question about a shape, its answer, and whether the answer is one of two."""
    x, y = thing.center
    questions = (
        ("What is the largest shape?", thing.kind, False),
        ("What colour is the largest shape?", thing.color, False),
        ("Is the largest shape on the left or on the right?", _half(x, "left", "right"), True),
        ("Is the largest shape at the top or at the bottom?", _half(y, "top", "bottom"), True),
    )
    return questions[rng.choice(len(questions), p=SHARES)]


def _half(place: float, first: str, second: str) -> str:
    return first if place < 0.5 else second

"""What is drawn of a conversation."""

from dataclasses import replace

import pytest
import torch
from checkpoints import save_checkpoint
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from transformers import AutoProcessor

from litflora.commands.samples import sheet
from litflora.datamodules.conversations import ASSISTANT, USER, Conversation, Turn
from litflora.datamodules.vision_language import Conversations
from litflora.drawing import ConversationDrawing
from litflora.drawing.conversations import ANSWER, LINES, RIGHT, WRONG, collage, write
from litflora.language.encoding import Encoder
from litflora.language.processing import ProcessorEncoder
from litflora.language.shown import as_trained
from litflora.language.tiny import byte_tokenizer


def image(height=8, width=8, value=0):
    return torch.full((3, height, width), value, dtype=torch.uint8)


def conversation(*texts, images=(), **options):
    roles = (USER, ASSISTANT) * len(texts)
    turns = tuple(Turn(role, text) for role, text in zip(roles, texts, strict=False))
    return Conversation("a", turns, tuple(images), **options)


ONE = conversation("<image>\nA cat?", "yes", images=[image()])
TWO = conversation("<image>\nA cat?", "yes", "And <image>?", "a $5 dog", images=[image(), image()])


def written(axis):
    texts = [text for text in axis.texts if text.get_text()]
    return [
        (text.get_text(), tuple(round(255 * c) for c in to_rgb(text.get_color()))) for text in texts
    ]


def axes(count):
    return Figure().subplots(1, count)


def test_images_stand_side_by_side_with_room_for_text():
    joined = collage([image(30, 20, 7), image(10, 6, 9)])
    assert joined.shape == (3, 30, 30)
    assert (joined[:, :30, :20] == 7).all()
    assert (joined[:, :10, 24:] == 9).all()
    assert (joined[:, 10:, 24:] == 255).all()
    assert collage([image(10, 100)]).shape == (3, 75, 100)
    assert collage([]).min() == 255


def test_a_sample_shows_what_the_assistant_says():
    drawing = ConversationDrawing([])
    picture, target, name = drawing.shown(TWO)
    both = axes(2)
    assert drawing.sample(both, picture, target) == {ANSWER}
    assert name == "a"
    assert [text for text, _ in written(both[1])] == [
        "<image>",
        "A cat?",
        "yes",
        "And <image>?",
        "a $5 dog",
    ]
    green = [text for text, color in written(both[1]) if color == ANSWER.color]
    assert green == ["yes", "a $5 dog"]


@pytest.mark.parametrize(
    ("said", "color"), [("A dog.", RIGHT.color), ("cat", WRONG.color), ("", WRONG.color)]
)
def test_an_answer_is_right_or_wrong(said, color):
    drawing, three = ConversationDrawing([]), axes(3)
    asked = conversation("<image>\nWhat?", "dog", images=[image()], answers=("dog", "dog", "pup"))
    picture, target, _ = drawing.shown(asked)
    drawing.compare(three, picture, target, said)
    assert written(three[1])[-1] == ("dog | pup", RIGHT.color)
    assert written(three[2]) == [(said or "(nothing)", color)]


def test_nobody_says_a_caption_word_by_word():
    drawing, three = ConversationDrawing([]), axes(3)
    said = ("a dog in the snow", "a dog that plays outside")
    picture, target, _ = drawing.shown(
        conversation("<image>", said[0], images=[image()], answers=said)
    )
    assert drawing.compare(three, picture, target, "a cat") == {RIGHT}
    assert written(three[1])[1:] == [(text, RIGHT.color) for text in said]  # each on its own
    assert written(three[2])[0][1] not in (RIGHT.color, WRONG.color)


def test_the_answer_is_that_of_the_question_alone():
    class Module:
        def reply(self, asked):
            return repr([turn.text for turn in asked.turns])

    said = ConversationDrawing([]).predict(Module(), TWO)
    assert said == repr(["<image>\nA cat?", "yes", "And <image>?"])


def test_what_no_font_has_gets_a_sign():
    axis = Figure().subplots()
    write(axis, [("a\x03 b\x1f", (0, 0, 0))])
    assert [text for text, _ in written(axis)] == ["a\ufffd b\ufffd"]


def test_long_texts_are_cut_off():
    axis = Figure().subplots()
    write(axis, [("word " * 300, (0, 0, 0))])
    assert len(axis.texts) == LINES
    assert axis.texts[-1].get_text() == "…"


@pytest.fixture
def encoder():
    return Encoder(byte_tokenizer(), tokens_per_image=3, max_length=31, image_size=(6, 12))


def test_what_comes_to_training_is_read_back_from_tokens(encoder):
    seen = as_trained(encoder, TWO)
    said = [(turn.role, turn.text) for turn in seen.turns]
    assert said == [
        (USER, "<s><user><image> x 3 \nA cat?<assistant>"),
        (ASSISTANT, "yes</s>"),
        (USER, "<user>And <image> x 3 ?<assistant>"),
        (ASSISTANT, "a $5"),  # 31 tokens end there
    ]
    assert [tuple(each.shape) for each in seen.images] == [(3, 6, 12)] * 2
    assert seen.images[0][:, :, :3].unique().tolist() == [127]  # padded, not cut off


def test_images_are_shown_as_a_processor_feeds_them(tmp_path):
    processor = AutoProcessor.from_pretrained(save_checkpoint("llava", tmp_path))
    image = torch.zeros(3, 50, 90, dtype=torch.uint8)
    image[0] = 250
    seen = as_trained(ProcessorEncoder(processor, 200), replace(ONE, images=(image,)))
    (fed,) = seen.images
    made = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    assert fed.dtype == torch.uint8
    assert fed.shape == made.shape != image.shape
    assert [channel.unique().tolist() for channel in fed] == [[250], [0], [0]]


def test_a_sheet_of_conversations(encoder):
    def trained(sample):
        return as_trained(encoder, sample)

    figure = sheet(ConversationDrawing([]), Conversations([TWO], ["a"], trained), [0])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["a", "", "in training", ""]
    first, second = (written(figure.axes[place])[0][0] for place in (1, 3))
    assert (first, second) == ("<image>", "<s><user><image> x 3")


def test_a_panorama_is_drawn_small():
    """Paper for it as it is would take gigabytes."""
    drawn = collage([torch.zeros(3, 1, 30000, dtype=torch.uint8), torch.zeros(3, 40, 30)])
    assert drawn.shape[-1] == 512 + 4 + 30
    assert max(drawn.shape) < 600

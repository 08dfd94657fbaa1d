"""Batches by the processor of a checkpoint, against what was written by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import KINDS, save_checkpoint
from torch import Tensor

from litflora import PretrainedVisionLanguageModule
from litflora.datamodules.conversations import Conversation, Turn
from litflora.language.pretrained import pretrained_model, processor_of
from litflora.language.processing import ProcessorEncoder

IMAGE = torch.full((3, 56, 56), 90, dtype=torch.uint8)
LONG = 400


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("processors")
    return {kind: save_checkpoint(kind, root / kind) for kind in KINDS}


def encoder(folder: Path, max_length: int = LONG) -> ProcessorEncoder:
    return ProcessorEncoder(processor_of(str(folder)), max_length)


def talk(*texts: str, name: str = "one", system: str = "") -> Conversation:
    """Turns of user and assistant in turn, with as many images as there are marks."""
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    first = [Turn("system", system)] if system else []
    return Conversation(name, (*first, *turns), (IMAGE,) * "".join(texts).count("<image>"))


def told(encoder: ProcessorEncoder, ids: Tensor) -> str:
    """Text of tokens, those of images counted."""
    text = encoder.tokenizer.decode(ids)
    token = encoder.processor.image_token
    while token in text:
        count = 1
        while token * (count + 1) in text:
            count += 1
        text = text.replace(token * count, f"[{count}]")
    return text


def spoken(encoder: ProcessorEncoder, labels: Tensor) -> str:
    return encoder.tokenizer.decode(labels[labels != -100])


# A square of 56 pixels is 16 patches of LLaVA, 4 merged ones of Qwen2-VL, and one of InternVL.
ASK, ANSWER, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
QWEN = "<|vision_start|>[4]<|vision_end|>"
CASES: list[tuple[str, Conversation, str, str]] = [
    (
        "llava",
        talk("<image>\nWhat?", "a cat"),
        "USER: [16]\nWhat? ASSISTANT: a cat</s>",
        " a cat</s>",
    ),
    (
        "llava",
        talk("Hi", "yo", "<image>\n<image>\nSame?", "no", system="Be brief."),
        "Be brief. USER: Hi ASSISTANT: yo</s>USER: [16]\n[16]\nSame? ASSISTANT: no</s>",
        " yo</s> no</s>",
    ),
    ("llava", talk("Hi", "yo"), "USER: Hi ASSISTANT: yo</s>", " yo</s>"),
    (
        "qwen2_vl",
        talk("<image>\nWhat?", "a cat"),
        f"{ASK}{QWEN}What?{END}{ANSWER}a cat{END}",
        f"a cat{END.strip()}",
    ),
    (
        "qwen2_vl",
        talk("Hi", "yo", "See\n<image>\nand\n<image>", "no"),
        f"{ASK}Hi{END}{ANSWER}yo{END}{ASK}See{QWEN}and{QWEN}{END}{ANSWER}no{END}",
        f"yo{END.strip()}no{END.strip()}",
    ),
    (
        "internvl",
        talk("<image>\nWhat?", "a cat é"),
        f"{ASK}<img>[1]</img>What?{END}{ANSWER}a cat é{END}",
        f"a cat é{END.strip()}",
    ),
]


@pytest.mark.parametrize(("kind", "conversation", "text", "answers"), CASES)
def test_text_images_and_labels(
    folders: dict[str, Path], kind: str, conversation: Conversation, text: str, answers: str
) -> None:
    made = encoder(folders[kind])
    batch = made.train_batch([conversation])
    assert told(made, batch["input_ids"][0]) == text
    assert spoken(made, batch["labels"][0]) == answers
    learnt = batch["labels"] != -100
    assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_are_those_of_the_samples_alone(
    folders: dict[str, Path], kind: str
) -> None:
    made = encoder(folders[kind])
    talks = [talk("<image>\nWhat?", "a cat"), talk("Hi", "yo"), talk("A\n<image>\n?", "b" * 40)]
    batch = made.train_batch(talks)
    for row, each in enumerate(talks):
        alone = made.train_batch([each])
        length = alone["input_ids"].shape[1]
        for key in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(batch[key][row, :length], alone[key][0]), key
        assert not batch["attention_mask"][row, length:].any()
        assert (batch["labels"][row, length:] == -100).all()
    prompts = made.predict_batch([each.question() for each in talks])
    assert prompts["questions"][0] == "What?"
    last = [told(made, ids)[-9:] for ids in prompts["input_ids"]]
    assert len(set(last)) == 1  # padded on the left
    assert "labels" not in prompts


def test_what_is_too_long_is_cut_but_never_an_image(folders: dict[str, Path]) -> None:
    whole = encoder(folders["qwen2_vl"])
    two = talk("<image>\nWhat?", "a cat", "And\n<image>\n?", "a dog")
    ids = whole.train_batch([two])["input_ids"][0]
    places = (ids == whole.processor.image_token_id).nonzero().flatten().tolist()
    first = len(whole.train_batch([talk("<image>\nWhat?", "a cat")])["input_ids"][0])
    assert first < places[4] < places[7]
    for length in (len(ids), len(ids) - 2, places[7] + 1, places[7], places[5], first):
        batch = encoder(folders["qwen2_vl"], length).train_batch([two])
        cut = batch["input_ids"][0]
        assert torch.equal(cut, ids[: len(cut)])
        assert len(cut) == (length if length > places[7] else first)
        images = int((cut == whole.processor.image_token_id).sum()) // 4
        assert len(batch["image_grid_thw"]) == images
    for length in (places[2], places[3] + 1):
        short = encoder(folders["qwen2_vl"], length)
        with pytest.raises(ValueError, match=r"conversation long: none of its answers begins"):
            short.train_batch([talk("<image>\nWhat?", "a cat", name="long")])
    with pytest.raises(ValueError, match=r"question of conversation long has"):
        short.predict_batch([talk("<image>\nWhat?", name="long")])


def test_errors_name_what_is_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"AutoProcessor cannot read .*nowhere"):
        processor_of(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"ImageTextToText cannot read .*nowhere"):
        pretrained_model(str(tmp_path / "nowhere"))
    module = PretrainedVisionLanguageModule(str(folders["llava"]), max_length=513)
    with pytest.raises(ValueError, match="513 is more than the 512 positions"):
        _ = module.encoder
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        PretrainedVisionLanguageModule(str(folders["llava"]), max_length=0)
    odd = Conversation("odd", (Turn("user", "What?"), Turn("assistant", "a")), (IMAGE,))
    with pytest.raises(ValueError, match=r"odd has 1 image\(s\), and the chat template writes 0"):
        encoder(folders["llava"]).train_batch([odd])


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ({"chat_template": None}, "has no chat template"),
        ({"image_token": None}, "has no image_token"),
        ({"image_processor": None}, "takes no images"),
    ],
)
def test_processors_that_lack_something(tmp_path: Path, lost: dict[str, Any], told: str) -> None:
    processor = processor_of(str(save_checkpoint("llava", tmp_path / "one")))
    for name, value in lost.items():
        setattr(processor, name, value)
    with pytest.raises(ValueError, match=told):
        ProcessorEncoder(processor, LONG)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_before_an_image_changes_nothing(folders: dict[str, Path], kind: str) -> None:
    writer = encoder(folders[kind])
    text, seen = talk("Hi", "yo", name="text"), talk("<image>\nWhat?", "a cat")
    before, after = writer.train_batch([text, seen]), writer.train_batch([seen, text])
    assert torch.equal(before["labels"], after["labels"].flip(0))
    assert torch.equal(before["pixel_values"], after["pixel_values"])

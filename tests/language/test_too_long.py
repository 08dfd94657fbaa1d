"""Conversations that are too long: left out of training, unanswered in an evaluation."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import save_checkpoint
from torch.utils.data import DataLoader

from litflora.datamodules.conversations import Conversation, Turn
from litflora.drawing import ConversationDrawing
from litflora.language.encoding import IGNORED, Encoder
from litflora.language.pretrained import processor_of
from litflora.language.processing import ProcessorEncoder
from litflora.language.tiny import byte_tokenizer
from litflora.language.too_long import TooLongError

PICTURE = torch.full((3, 56, 56), 90, dtype=torch.uint8)


def asked(name, question, answer="yes"):
    images = (PICTURE,) * question.count("<image>")
    return Conversation(name, (Turn("user", question), Turn("assistant", answer)), images)


SHORT = [asked("first", "<image>\nIs it?"), asked("second", "Why?", "So.")]
LONG, LONGER = (asked(name, "<image>\n" + "so " * 500) for name in ("long", "longer"))
MIXED = [LONG, SHORT[0], LONGER, SHORT[1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint("llava", tmp_path_factory.mktemp("processor") / "llava")


@pytest.fixture(params=["own", "processor"])
def encoder(request):
    if request.param == "own":
        return Encoder(byte_tokenizer(), 2, 100, (8, 8))
    folder: Path = request.getfixturevalue("folder")
    return ProcessorEncoder(processor_of(str(folder)), 100)


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        equal = torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
        assert equal, key


def test_training_leaves_them_out_and_warns_once(encoder):
    kept = "conversation long.*; a higher max_length keeps it"
    with pytest.warns(UserWarning, match=kept) as told:
        found = encoder.train_batch(MIXED)
    assert len(told) == 1
    same(found, encoder.train_batch(SHORT))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(encoder.train_batch([SHORT[0], LONGER]), encoder.train_batch(SHORT[:1]))


def test_packed_rows_leave_them_out():
    encoder = Encoder(byte_tokenizer(), 2, 100, (8, 8))
    with pytest.warns(UserWarning, match="conversation long has"):
        found = encoder.packed_batch(MIXED)
    same(found, encoder.packed_batch(SHORT))


def test_a_batch_of_nothing_else_is_refused(encoder):
    with pytest.raises(
        TooLongError, match=r"conversation long.* max_length 100.*: raise it, or leave"
    ):
        encoder.train_batch([LONG, LONGER])


def test_an_evaluation_counts_them_as_unanswered(encoder):
    with pytest.warns(UserWarning, match="conversation long.*it counts as unanswered") as told:
        found = encoder.eval_batch(MIXED)
    assert len(told) == 1
    assert found["unanswered"] == [True, False, True, False]
    assert (found["labels"][[0, 2]] == IGNORED).all()
    assert found["prompt"]["ids"] == ["long", "first", "longer", "second"]
    assert found["accepted"] == [("yes",), ("yes",), ("yes",), ("So.",)]
    # What can be answered is as if nothing else were there.
    alone = encoder.eval_batch(SHORT)
    assert alone["unanswered"] == [False, False]
    for own, other in ((found, alone), (found["prompt"], alone["prompt"])):
        for key in ("input_ids", "labels") if "labels" in other else ("input_ids",):
            seen, truth = (each["attention_mask"].bool() for each in (own, other))
            for row, alike in ((1, 0), (3, 1)):
                assert torch.equal(own[key][row][seen[row]], other[key][alike][truth[alike]]), key


def test_questions_that_end_at_the_last_token_are_answered():
    """No answer begins within max_length, so that there is no loss; but the question has room."""
    encoder = Encoder(byte_tokenizer(), 2, 100, (8, 8))
    length = len(encoder.prompt(SHORT[0].question()).input_ids)
    encoder.max_length = length
    with pytest.warns(UserWarning, match="it counts as nothing in the loss"):
        found = encoder.eval_batch([SHORT[0]])
    assert found["unanswered"] == [False]
    assert found["prompt"]["input_ids"].shape == (1, length)
    assert (found["labels"] == IGNORED).all()


def test_where_nothing_has_room_the_question_is_named():
    encoder = Encoder(byte_tokenizer(), 2, 3, (8, 8))
    with pytest.raises(TooLongError, match="conversation first has"):
        encoder.eval_batch(SHORT)


def test_processes_that_load_warn_once_between_them():
    """Each epoch has new ones, which know what an earlier one has said."""
    encoder = Encoder(byte_tokenizer(), 2, 100, (8, 8))
    loader = DataLoader(MIXED, 4, num_workers=1, collate_fn=encoder.train_batch)
    assert [len(batch["input_ids"]) for batch in loader] == [2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.train_batch(MIXED)


def test_a_gallery_draws_no_answer():
    module = SimpleNamespace(reply=Encoder(byte_tokenizer(), 2, 100, (8, 8)).prompt)
    assert ConversationDrawing([]).predict(module, LONG) == ""

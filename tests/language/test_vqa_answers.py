"""Answers as VQA's evaluation compares them, worked out by hand."""

import pytest

from litflora.language.measures import vqa_accuracy
from litflora.language.vqa_answers import vqa_normalized


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("Two", "2"),
        ("none", "0"),
        ("zero cats", "0 cats"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("someone", "someone"),  # a number is a word, not a part of one
        ("The cat on a mat", "cat on mat"),
        ("A", "a"),  # a choice's letter
        ("a\n red\tcat", "red cat"),
        ("yes, it is", "yes it is"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("x - y-z", "x yz"),  # one of the kind is beside a blank: all go
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma between digits: all marks go
        ("red,white", "red white"),
        ("yes!", "yes"),
        ('"two"', "2"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("yes.", "yes"),
        ("U.S.A.", "usa"),
        ("5.", "5"),
        ("isn't", "isnt"),
        ("isnt", "isnt"),
        ("couldn't've", "couldntve"),
        ("couldnt've", "couldntve"),
        ("what's", "whats"),
        ("they’re", "theyre"),
        ("it's", "it's"),  # is not "its"
        ("we're", "we're"),  # is not "were"
        ("cat's", "cat's"),
        ("", ""),
    ],
)
def test_what_is_left(said: str, left: str) -> None:
    assert vqa_normalized(said) == left


def test_accuracy_is_of_what_is_left() -> None:
    accepted = ["2", "two", "Two.", "a two", *["3"] * 6]
    # Of those who said two, three others agree at least: 1 each; so it is for those who did not.
    assert vqa_accuracy("two", accepted) == 1.0
    # With only two who said it, each has one other (1/3), all others have two (2/3).
    assert vqa_accuracy("none", ["0", "none", *["1"] * 8]) == pytest.approx((2 + 8 * 2) / 30)
    assert vqa_accuracy("dont walk", ["don't walk"]) == 1.0
    assert vqa_accuracy("its", ["it's"]) == 0.0

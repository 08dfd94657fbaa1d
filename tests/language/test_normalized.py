"""Answers that differ in nothing that matters are the same, and no others."""

import pytest

from litflora.language.measures import normalized


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("The cat.", "cat"),
        (" a red  Cat ", "red cat"),
        ("A", "a"),
        ("A.", "a"),
        ("B.", "b"),
        ("", ""),
        ("Theatre", "theatre"),
        ("A, B", "a, b"),
        ("vitamin A", "vitamin a"),
        ("The cat on the mat!", "cat on the mat"),
        ('The "cat"', "cat"),
        ("the", "the"),
        ("The ", "the"),
        ("two", "two"),
    ],
)
def test_what_is_left_of_an_answer(said: str, left: str) -> None:
    assert normalized(said) == left

"""Answers as VQA's evaluation compares them."""

from __future__ import annotations

import re

MARKS = ',;!?"@`/\\-_+=<>()[]{}'
ARTICLES = {"a", "an", "the"}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(WORDS)}}

# Contractions without their apostrophes. Those that are other words then ("its", "were", "well",
# "id") are not among them: VQA's evaluation tells them apart, too.
SOME = "somebody|someone|something"
CONTRACTION = re.compile(
    "(ai|are|ca|could|did|does|do|had|has|have|is|might|must|need|ought|sha|should|was|were|wo"
    "|would)nt(ve)?"
    "|(could|might|must|not|should|would|i|they|we|what|where|who|you)ve"
    f"|(he|i|it|she|there|they|we|who|you|{SOME})dve"
    f"|(he|how|it|there|they|where|who|you|{SOME})d"
    f"|(how|it|they|what|who|why|you|{SOME})ll"
    "|(there|they|what|why|you)re"
    f"|(he|how|that|there|what|when|where|who|why|{SOME})s"
    "|im|maam|oclock|twas|yall"
)


def vqa_normalized(answer: str) -> str:
    """An answer as VQA's evaluation compares it (Antol et al., arXiv:1505.00468).

    In lower case, numbers up to ten as digits, without articles, marks and the apostrophes of
    contractions. An answer that is nothing but an article stays: it may be a choice's letter.
    """
    words = _without_marks(answer.lower()).split()
    told = [NUMBERS.get(word, word) for word in words if word not in ARTICLES] or words
    return " ".join(map(_contracted, told))


def _without_marks(text: str) -> str:
    """Marks go where one of the kind is beside a blank, or a comma between digits; or are blanks.

    Periods stay in front of digits alone.
    """
    text = " ".join(text.split())
    grouped = re.search(r"\d,\d", text) is not None
    left = text
    for mark in MARKS:
        goes = grouped or f"{mark} " in text or f" {mark}" in text
        left = left.replace(mark, "" if goes else " ")
    return re.sub(r"\.(?!\d)", "", left)


def _contracted(word: str) -> str:
    bare = word.replace("'", "").replace("’", "")
    return bare if CONTRACTION.fullmatch(bare) else word

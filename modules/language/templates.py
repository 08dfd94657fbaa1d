"""How a conversation is written as text, and which of it the assistant says."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..datamodules.conversations import ASSISTANT, IMAGE, SYSTEM, Turn

# Of Vicuna v1, which LLaVA-1.5 was trained with: for tokenizers that bring no chat template.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)

Span = tuple[int, int]


def written(tokenizer: Any, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
    """A conversation as the tokenizer's chat template writes it, or as Vicuna v1 does.

    Args:
        tokenizer: A tokenizer of transformers.
        turns: The conversation. If the last turn is not the assistant's, what asks for its answer
            is written at the end.

    Returns:
        The text, and the spans of characters ``[begin, end)`` in it that the assistant says, the
        ends of its turns included.

    Raises:
        ValueError: The template rewrites what it wrote before, so that there are no such spans.
    """
    return spoken(
        partial(_render, tokenizer), harmless(tokenizer, turns), tokenizer.eos_token or ""
    )


def harmless(tokenizer: Any, turns: Sequence[Turn]) -> list[Turn]:
    """Turns in whose texts no token of the template stands, so that nobody speaks for another.

    A blank goes into what would be one, such as ``</s>``; marks of images stay.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = sorted({token.content for token in added if token.special} - {IMAGE}, key=len)
    pattern = re.compile("|".join(map(re.escape, reversed(special))) or r"(?!)")
    apart = lambda found: f"{found[0][:1]} {found[0][1:]}"  # noqa: E731
    return [replace(turn, text=pattern.sub(apart, turn.text)) for turn in turns]


def spoken(
    render: Callable[[Sequence[Turn], bool], str], turns: Sequence[Turn], end: str
) -> tuple[str, list[Span]]:
    """A conversation as text, and the spans in it that the assistant says, as `written` gives them.

    A template that writes nothing after an answer, as that of LLaVA-1.5, would teach no answer to
    end: the end is put there. Blanks that a template writes after an answer are not learnt.

    Args:
        render: Writes turns as text, and at the end, if it is asked to, what asks for an answer.
        turns: The conversation.
        end: What ends an answer that the template does not end.
    """
    text, spans, done = "", [], ""
    for index, turn in enumerate(turns):
        if turn.role == ASSISTANT:
            before = _following(render(turns[:index], True), done)
            answer = _following(render(turns[: index + 1], False), done + before)
            said, blanks = _ended(answer, turn.text, end)
            begin = len(text) + len(before)
            spans.append((begin, begin + len(said)))
            text += before + said + blanks
            done += before + answer
    if turns and turns[-1].role == ASSISTANT:
        return text, spans
    return text + _following(render(turns, True), done), spans


def _following(text: str, before: str) -> str:
    """What a text goes on with."""
    if not text.startswith(before):
        raise ValueError(
            "the tokenizer's chat template writes earlier turns anew when later ones come, so that "
            "nobody can tell what the assistant says: set another chat_template"
        )
    return text[len(before) :]


def _ended(answer: str, said: str, end: str) -> tuple[str, str]:
    """An answer as the template writes it, with an end, and the blanks that follow it."""
    written = answer.rstrip()
    rest = written.rpartition(said.strip())[2] if said.strip() else written
    return (written, answer[len(written) :]) if rest else (written + end, "")


def _render(tokenizer: Any, turns: Sequence[Turn], ask: bool) -> str:
    if tokenizer.chat_template is None:
        return _vicuna(turns, ask, tokenizer.eos_token or "</s>")
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)


def _vicuna(turns: Sequence[Turn], ask: bool, end: str) -> str:
    told = [turn.text for turn in turns if turn.role == SYSTEM]
    text = (told or [VICUNA_SYSTEM])[0] + " "
    for turn in turns:
        if turn.role == ASSISTANT:
            text += f"ASSISTANT: {turn.text}{end}"
        elif turn.role != SYSTEM:
            text += f"USER: {turn.text} "
    return text + "ASSISTANT:" * ask

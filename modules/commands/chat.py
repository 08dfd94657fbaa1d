"""`litflora chat`: questions about images in the terminal, and the model's answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..answers import AnswersModule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the adapter, the images, and a question for those who have one alone."""
    parser.add_argument("adapter", type=Path, help="folder that a fit has saved")
    images = {"metavar": "IMAGE", "help": "image file; several are shown in this order"}
    parser.add_argument("images", type=Path, nargs="*", **images)
    parser.add_argument("--question", metavar="TEXT", help="print the answer to this and end")
    parser.add_argument("--weights", help="base weights, if they are not where the fit found them")
    parser.epilog = "An empty line or Ctrl-D ends it. Earlier turns are sent again each time."


def run(args: argparse.Namespace) -> None:
    """Answers one question, or a line at a time."""
    if args.question is not None and not args.question.strip():
        raise ValueError("--question is empty: leave it out to be asked")
    _check_task(args.adapter)
    for path in args.images:
        if not path.is_file():
            raise FileNotFoundError(f"there is no image {path}")

    from ..datamodules.conversations import ASSISTANT, IMAGE, USER, Conversation, Turn
    from ..datamodules.vision_language import read_image

    images = tuple(map(read_image, args.images))
    module = _module(args)
    turns: list[Turn] = []
    for question in _questions() if args.question is None else [args.question]:
        if IMAGE in question:
            raise ValueError(f"a question cannot hold {IMAGE}: images are named after the adapter")
        turns.append(Turn(USER, question if turns else f"{IMAGE}\n" * len(images) + question))
        asked = Conversation("chat", tuple(turns), images)
        asked.check(answered=False)
        answer = module.reply(asked)
        turns.append(Turn(ASSISTANT, answer))
        print(answer, flush=True)


def _check_task(adapter: Path) -> None:
    from ..adapters import read_config

    task = read_config(adapter).get("metadata", {}).get("task")
    if task != "vision_language":
        raise ValueError(
            f"adapter {adapter} does not answer questions: it was trained for "
            f"{task or 'something else'}, and chat needs vision_language"
        )


def _module(args: argparse.Namespace) -> AnswersModule:
    """The adapter's model, ready to answer, on an accelerator if there is one."""
    import torch

    from ..module import from_adapter

    module = from_adapter(args.adapter, **({"weights": args.weights} if args.weights else {}))
    module.configure_model()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return module.eval().to(accelerator or torch.device("cpu"))


def _questions() -> Iterator[str]:
    """Lines up to an empty one; a prompt is shown to a person only."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if not line:
            return
        yield line

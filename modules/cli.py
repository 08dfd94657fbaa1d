"""The command line.

`fit`, `validate`, `test` and `predict` are LightningCLI's own; the small commands around them are
argparse. What a command needs is imported when it runs: `litflora --help` loads no torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from . import __version__
from .commands import calibrate, chat, compare, inspect, merge, recipes, samples
from .commands.mistakes import explain

TRAINING = {
    "fit": "tune a model: litflora fit --config quickstart",
    "validate": "evaluate on the validation split",
    "test": "evaluate on the test split: litflora test --adapter RUN/adapter",
    "predict": "write predictions: litflora predict --adapter RUN/adapter",
}
# Commands that take any option of fit, besides their own.
TAKES_OPTIONS = (inspect.run, samples.run, calibrate.run, compare.run)
SAMPLES = "inspect data"  # two words to the person, one command to argparse


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}\n`{self.prog} --help` shows what there is")


def main(args: list[str] | None = None) -> int:
    """Runs a command: 0 if it went well, 2 for a person's mistake, 130 for Ctrl-C; a bug raises."""
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        _run(args)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        message = explain(error)
        if debug or message is None:
            raise
        print("error: " + message.replace("\n", "\n       "), file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns a Ctrl-C that stops a run at once into an exit with 1.
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        return 130
    return 0


def _run(args: list[str]) -> None:
    if args and args[0] in TRAINING:
        from .commands import train

        train.run(args[0], args[1:])
        return
    if args[:2] == ["inspect", "data"]:
        args = [SAMPLES, *args[2:]]
    parser = _parser()
    options, options.overrides = parser.parse_known_args(args or ["--help"])
    if options.overrides and options.run not in TAKES_OPTIONS:
        parser.error(f"unrecognized arguments: {' '.join(options.overrides)}")
    options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="litflora",
        description=sys.modules[__package__].__doc__.splitlines()[0],
        epilog="`litflora COMMAND --help` says more. --debug shows the traceback of a mistake.",
    )
    parser.add_argument("--version", action="version", version=f"litflora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, what in TRAINING.items():
        commands.add_parser(name, help=what)
    _add(commands, "recipes", "list, show or copy the shipped recipes", recipes)
    _add(commands, "inspect", "show what a recipe would adapt, or a saved adapter does", inspect)
    _add(commands, SAMPLES, "draw training samples of a recipe, with their truth", samples)
    _add(commands, "calibrate", "time the computing paths of a recipe on this machine", calibrate)
    _add(commands, "compare", "tune a recipe by several methods, and report", compare)
    _add(commands, "merge", "write an adapter and its base as plain weights", merge)
    _add(commands, "chat", "ask a vision-language adapter about an image", chat)
    return parser


def _add(commands: Any, name: str, what: str, module: Any) -> None:
    parser = commands.add_parser(name, help=what, description=what)
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)

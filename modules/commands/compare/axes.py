"""What is compared: tunings, ranks, rates and seeds, as they are typed."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import TypeVar

from .. import recipes

T = TypeVar("T")

# What the command sets itself, and by which of its own options.
_OWN = {
    "--seed_everything": "--seeds",
    "--model.lr": "--lrs",
    "--model.init_args.lr": "--lrs",
    "--model.tuning": "--tunings",
    "--model.init_args.tuning": "--tunings",
    "--model.tuning.class_path": "--tunings",
    "--model.init_args.tuning.class_path": "--tunings",
    "--model.adapter": "--tunings",
    "--model.init_args.adapter": "--tunings",
    "--adapter": "--tunings",
    "--trainer.logger": "--out",
    "--trainer.default_root_dir": "--out",
    "--trainer.devices": "no number of devices: a compare runs on one",
}
_MOST = 2**32 - 1  # the greatest seed that NumPy takes
# What is nothing by itself, and the recipe that brings what it lacks.
_LACKING = {"AdaLoRA": "tuning/adalora"}


@dataclass(frozen=True)
class Axes:
    """What is compared.

    Attributes:
        recipe: The recipe of all runs.
        tunings: Classes of `litflora.adapters`, or recipes.
        ranks: For those that have a rank; none is each one's own.
        rates: Learning rates by tuning; none is each one's own.
        seeds: One run each.
        options: What follows for all runs, as for `fit`.
    """

    recipe: str
    tunings: tuple[str, ...]
    ranks: tuple[int, ...]
    rates: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    options: tuple[str, ...]


def read(args: argparse.Namespace) -> Axes:
    """Reads the command line.

    Raises:
        ValueError: If an axis holds what it cannot.
        FileNotFoundError: If there is no such recipe.
    """
    recipes.find(args.recipe)
    tunings = tuple(dict.fromkeys(map(_tuning, args.tunings)))
    _check_options(args.overrides)
    return Axes(
        recipe=args.recipe,
        tunings=tunings,
        ranks=_numbers("--ranks", args.ranks, _whole(1), "whole numbers of at least 1"),
        rates=_rates(args.lrs, tunings),
        seeds=_numbers("--seeds", args.seeds, _whole(0, _MOST), f"whole numbers from 0 to {_MOST}"),
        options=tuple(args.overrides),
    )


def command(args: argparse.Namespace) -> str:
    """The command line that was typed."""
    axes = {"tunings": args.tunings, "ranks": args.ranks, "lrs": args.lrs, "seeds": args.seeds}
    named = {**axes, "out": [str(args.out)]}
    words = [word for name, given in named.items() if given for word in (f"--{name}", *given)]
    return shlex.join(["litflora", "compare", args.recipe, *words, *args.overrides])


def known() -> list[str]:
    """The tunings that a compare can name: all that stand alone and train something."""
    from ... import adapters
    from ...adapters.tuning import Tuning

    general = ("DeltaTuning", "Frozen", "PerModule", "Selective", "Tuning", *_LACKING)
    found = {name: getattr(adapters, name) for name in adapters.__all__ if name not in general}
    return [n for n, kind in found.items() if isinstance(kind, type) and issubclass(kind, Tuning)]


def _tuning(name: str) -> str:
    if "/" in name or Path(name).is_file():
        recipes.find(name)
        return name
    if name in _LACKING:
        raise ValueError(
            f"--tunings: {name} has no budget by itself, and no rank would change:\n"
            f"name {_LACKING[name]}"
        )
    by_lower = {each.lower(): each for each in known()}
    if name not in by_lower.values():
        shipped = {PurePath(each).name: each for each in recipes.names() if "tuning/" in each}
        meant = _meant(name.lower(), {**shipped, **by_lower})
        raise ValueError(
            f"--tunings: there is no {name!r}{meant}\nthere are {', '.join(by_lower.values())}, "
            "and recipes such as tuning/full"
        )
    return name


def _meant(name: str, known: Mapping[str, str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {known[near[0]]!r}?" if near else ""


def _rates(words: Sequence[str], tunings: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    """The rates of each tuning: those that name it, or else those that name none."""
    common: list[str] = []
    own: dict[str, list[str]] = {}
    for word in words:
        name, equals, rate = word.rpartition("=")
        if equals and name not in tunings:
            by_lower = {PurePath(each).stem.lower(): f"{each}={rate}" for each in tunings}
            meant = _meant(PurePath(name).stem.lower(), by_lower)
            raise ValueError(f"--lrs: {name!r} is none of the tunings {', '.join(tunings)}{meant}")
        (own.setdefault(name, []) if equals else common).append(rate)
    wanted = "numbers above 0, or NAME=RATE"
    return {name: _numbers("--lrs", own.get(name, common), _positive, wanted) for name in tunings}


def _numbers(
    option: str, words: Sequence[str], read_one: Callable[[str], T], wanted: str
) -> tuple[T, ...]:
    found = []
    for word in words:
        try:
            found.append(read_one(word))
        except ValueError:
            raise ValueError(f"{option} takes {wanted}, not {word!r}") from None
    return tuple(dict.fromkeys(found))


def _whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    def read_one(word: str) -> int:
        if not least <= int(word) <= most:
            raise ValueError
        return int(word)

    return read_one


def _positive(word: str) -> float:
    rate = float(word)
    if not (rate > 0 and math.isfinite(rate)):
        raise ValueError
    return rate


def _check_options(options: Sequence[str]) -> None:
    if options and not options[0].startswith("-"):
        raise ValueError(f"there is one RECIPE; what is {options[0]!r}?")
    for option in options:
        instead = _OWN.get(option.partition("=")[0])
        if instead:
            raise ValueError(f"compare sets {option.partition('=')[0]} itself: give {instead}")

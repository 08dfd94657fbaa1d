"""The runs of a compare: what each is told, and the name of its folder."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ... import __version__
from ...adapters import summary
from ...optim import default_rate
from .. import composed
from .axes import Axes
from .data import versions

if TYPE_CHECKING:
    from ..train import LitFloraCLI

# What says where and how a run is shown, and changes nothing in it.
_OF_SHOW = ("logger", "default_root_dir", "enable_progress_bar", "enable_model_summary")


@dataclass(frozen=True)
class Run:
    """One fit, and its test if its rate is chosen.

    Attributes:
        tuning: As it was asked for.
        rank: None for what has none.
        rate: Learning rate; None is the recipe's own.
        seed: The seed of the run; that of the data is the recipe's.
        recipe: The recipe of all runs.
        arguments: What `litflora fit` is told to make the same run.
        settings: All that determines it.
    """

    tuning: str
    rank: int | None
    rate: float | None
    seed: int
    recipe: str
    arguments: tuple[str, ...]
    settings: dict[str, Any] = field(repr=False)

    @cached_property
    def name(self) -> str:
        """What a person reads, and a hash of all that determines the run."""
        text = json.dumps(self.settings, sort_keys=True, default=str)
        return f"{self.short_name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def short_name(self) -> str:
        """What a person reads."""
        rank = "" if self.rank is None else f"-r{self.rank}"
        rate = "" if self.rate is None else f"-lr{self.rate:g}"
        tuning = re.sub(r"[^\w.]+", "_", self.tuning)
        return f"{tuning}{rank}{rate}-seed{self.seed}"

    @property
    def label(self) -> str:
        """Tuning and rank, for people."""
        return self.tuning if self.rank is None else f"{self.tuning} r={self.rank}"

    @property
    def command(self) -> str:
        """The command that makes the same run again."""
        return shlex.join(["litflora", "fit", *self.arguments])

    @property
    def budget(self) -> list[tuple[str, str]]:
        """What all runs have alike, by name, for people."""
        trainer, data = self.settings["trainer"], self.settings["data"]
        limits = {key: v for key, v in trainer.items() if key.startswith(("max_", "limit_"))}
        given = {key: value for key, value in limits.items() if value not in (None, -1)}
        batch = data.get("init_args", {}).get("batch_size")
        told = {"data": data["class_path"].rpartition(".")[2], "batch_size": batch, **given}
        return [(key, str(value)) for key, value in told.items() if value is not None]


@dataclass
class Cell:
    """One tuning at one rank: the runs of all its rates and seeds.

    Attributes:
        tuning: As it was asked for.
        rank: None for what has none.
        made: The model and data of a run.
        runs: By rate, those of all seeds.
    """

    tuning: str
    rank: int | None
    made: LitFloraCLI
    runs: dict[float | None, list[Run]]

    @property
    def all_runs(self) -> list[Run]:
        """The runs of all rates."""
        return [run for runs in self.runs.values() for run in runs]

    def figures(self) -> dict[str, int]:
        """Parameters that train, and bytes kept for the backward of one batch.

        Raises:
            AdapterError: If the tuning does not fit the model.
        """
        made = composed.ready(self.made)
        images = composed.blank(made.model, made.data)
        found = summary(made.model.net, made.model.example(images))
        made.model.net = None
        return {"parameters": found.trainable, "saved_bytes": found.saved_bytes or 0}


def cells(axes: Axes) -> list[Cell]:
    """The cells of a compare, tunings in the order that they were asked for.

    Raises:
        ValueError: If the recipe lets a tuning have no effect, or lacks what is needed.
    """
    return [cell for tuning in axes.tunings for cell in _cells_of(axes, tuning)]


def _cells_of(axes: Axes, tuning: str) -> Iterator[Cell]:
    recipe = "/" in tuning or Path(tuning).is_file()
    first = ("--config", tuning) if recipe else ("--model.tuning", tuning)
    arguments = (*first, *axes.options)
    made = composed.built(axes.recipe, list(arguments))
    instead = _instead(made)
    if instead and not recipe:
        raise ValueError(
            f"the recipe sets {' and '.join(instead)}, beside which tuning has no effect:\n"
            f"set it to null, or give --tunings recipes that set it"
        )
    rates = axes.rates[tuning] or (None if instead else _own_rate(made, tuning),)
    own = None if instead else getattr(made.model.tuning, "rank", None)
    if own is None or not axes.ranks:
        shown = own if isinstance(own, int) else None
        yield _cell(axes, tuning, shown, made, rates, arguments)
        return
    for rank in axes.ranks:
        told = (*arguments, "--model.tuning.rank", str(rank))
        yield _cell(axes, tuning, rank, composed.built(axes.recipe, list(told)), rates, told)


def _instead(made: LitFloraCLI) -> list[str]:
    """The arguments of the model that leave its tuning nothing to do."""
    given = made.config.model.init_args
    sets = ("adapter",), ("tower_tuning", "language_tuning")
    return [k for keys in sets if all(given.get(key) for key in keys) for k in keys]


def _own_rate(made: LitFloraCLI, tuning: str) -> float:
    if made.model.optimizer_factory is not None:
        raise ValueError(f"the recipe names an optimizer: give --lrs for {tuning}")
    return default_rate(type(made.model.tuning).__name__)


def _cell(
    axes: Axes,
    tuning: str,
    rank: int | None,
    made: LitFloraCLI,
    rates: tuple[float | None, ...],
    arguments: tuple[str, ...],
) -> Cell:
    settings = _settings(made)

    def run(rate: float | None, seed: int) -> Run:
        given = () if rate is None else ("--model.lr", f"{rate:g}")
        told = (*given, "--seed_everything", str(seed), "--trainer.devices", "1")
        everything = {**settings, "rate": rate, "seed": seed}
        words = ("--config", axes.recipe, *arguments, *told)
        return Run(tuning, rank, rate, seed, axes.recipe, words, everything)

    runs = {rate: [run(rate, seed) for seed in axes.seeds] for rate in rates}
    return Cell(tuning, rank, made, runs)


def _settings(made: LitFloraCLI) -> dict[str, Any]:
    """All that determines a run but rate and seed."""
    config = yaml.safe_load(made.parser.dump(made.config))
    trainer = {key: v for key, v in config["trainer"].items() if key not in _OF_SHOW}
    read = {"model": config["model"], "data": config["data"]}
    return {**read, "trainer": trainer, "files": versions(read), "litflora": __version__}

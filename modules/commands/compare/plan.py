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

from ...adapters import summary
from ...optim import default_rate, methods_of
from .. import composed, recipes
from . import data, equal, limits, versions
from .axes import Axes

if TYPE_CHECKING:
    from ..train import LitFloraCLI

# What says where and how a run is shown, and changes nothing in it.
_OF_SHOW = ("logger", "default_root_dir", "enable_progress_bar", "enable_model_summary")
# The longest name of a run that a person reads; a hash follows, and disks take 255.
_LONGEST = 80


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
        told = f"{rank}{rate}-seed{self.seed}"
        tuning = re.sub(r"[^\w.]+", "_", self.tuning)
        return f"{tuning[-(_LONGEST - len(told)) :]}{told}"  # of a path the end says most

    @property
    def label(self) -> str:
        """Tuning and rank, for people."""
        return label(self.tuning, self.rank)

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
        made: The model and data of a run; None once its figures are known.
        runs: By rate, those of all seeds.
    """

    tuning: str
    rank: int | None
    made: LitFloraCLI | None
    runs: dict[float | None, list[Run]]

    @property
    def all_runs(self) -> list[Run]:
        """The runs of all rates."""
        return [run for runs in self.runs.values() for run in runs]

    def figures(self) -> dict[str, Any]:
        """The metric, parameters that train, and bytes kept for the backward of one batch.

        Raises:
            AdapterError: If the tuning does not fit the model.
            ValueError: If its rank is more than any weight has, and so another one in truth.
        """
        assert self.made is not None, "figures come before models are let go of"
        made = composed.ready(self.made)
        images = composed.blank(made.model, made.data)
        found = summary(made.model.net, made.model.example(images))
        if self.rank is not None and found.rows and all(row.clamped for row in found.rows):
            raise ValueError(f"{label(self.tuning, self.rank)}: no weight has that rank; lower it")
        costs = {"parameters": found.trainable, "saved_bytes": found.saved_bytes or 0}
        return {"metric": made.model.monitor, **costs}


@dataclass(frozen=True)
class Draft:
    """A cell whose data have not been looked at.

    Attributes:
        tuning: As it was asked for.
        rank: None for what has none.
        made: The model and data of a run.
        rates: Learning rates; None is the recipe's own.
        arguments: What its runs are told besides recipe, rate and seed.
    """

    tuning: str
    rank: int | None
    made: LitFloraCLI
    rates: tuple[float | None, ...]
    arguments: tuple[str, ...]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Its config, without what changes nothing in a run."""
        config = yaml.safe_load(self.made.parser.dump(self.made.config))
        trainer = {key: v for key, v in config["trainer"].items() if key not in _OF_SHOW}
        return {"model": config["model"], "data": config["data"], "trainer": trainer}


def label(tuning: str, rank: int | None) -> str:
    """Tuning and rank, for people."""
    return tuning if rank is None else f"{tuning} r={rank}"


def cells(axes: Axes, out: Path) -> tuple[list[Cell], dict[str, int]]:
    """The cells of a compare, tunings in the order that they were asked for, and its data's sizes.

    The data are fetched and set up here, for what they are decides the names of the runs.

    Args:
        axes: What is compared.
        out: The folder of the compare, which is no part of the data.

    Raises:
        ValueError: If the recipe lets a tuning have no effect, or lacks what is needed, if the
            budgets are not equal, or if no run could be chosen or tested.
    """
    drafts = [draft for tuning in axes.tunings for draft in _drafts(axes, tuning)]
    equal.check({label(each.tuning, each.rank): each.settings for each in drafts})
    first = drafts[0]  # all have the same data and limits
    limits.check(first.settings["trainer"])
    for draft in drafts:
        limits.check_monitored(draft.settings["trainer"], draft.made.model.monitor)
    data.check_apart(out, first.settings["data"])
    sizes = data.check(first.made, any(len(draft.rates) > 1 for draft in drafts))
    read = versions.Versions(out)
    return [_cell(axes, draft, read) for draft in drafts], sizes


def _drafts(axes: Axes, tuning: str) -> Iterator[Draft]:
    recipe = "/" in tuning or Path(tuning).is_file()
    # After null it begins with defaults of its own: else the rank of the recipe's tuning stays.
    anew = ("--model.tuning", "null", "--model.tuning", tuning)
    first = ("--config", tuning) if recipe else anew
    arguments = (*first, *axes.options)
    made = composed.built(axes.recipe, list(arguments))
    instead = _instead(made)
    if instead and not recipe:
        raise ValueError(
            f"the recipe sets {' and '.join(instead)}, beside which tuning has no effect:\n"
            f"set it to null, or give --tunings recipes that set it"
        )
    trains, meant = type(made.model.tuning).__name__, _class_in(tuning) if recipe else tuning
    if meant and trains != meant:
        raise ValueError(
            f"the options replace {meant} by {trains}: leave out what sets another tuning,\n"
            "or give it as a recipe in --tunings"
        )
    rates = axes.rates[tuning] or (None if instead else _own_rate(made, tuning),)
    own = None if instead else getattr(made.model.tuning, "rank", None)
    if own is None or not axes.ranks:
        shown = own if isinstance(own, int) else None
        yield Draft(tuning, shown, made, rates, arguments)
        return
    for rank in axes.ranks:
        told = (*arguments, "--model.tuning.rank", str(rank))
        yield Draft(tuning, rank, composed.built(axes.recipe, list(told)), rates, told)


def _class_in(recipe: str) -> str | None:
    """The class of the tuning that a recipe sets, if it sets one."""
    model = (yaml.safe_load(recipes.find(recipe).read_text()) or {}).get("model") or {}
    tuning = (model.get("init_args") or {}).get("tuning") or {}
    name = tuning if isinstance(tuning, str) else tuning.get("class_path", "")
    return name.rpartition(".")[2] or None


def _instead(made: LitFloraCLI) -> list[str]:
    """The arguments of the model that leave its tuning nothing to do."""
    given = made.config.model.init_args
    sets = ("adapter",), ("tower_tuning", "language_tuning")
    return [k for keys in sets if all(given.get(key) for key in keys) for k in keys]


def _own_rate(made: LitFloraCLI, tuning: str) -> float | None:
    """The rate that a fit would take; None if the recipe sets it."""
    if made.model.lr is not None:
        return None
    if made.model.optimizer_factory is not None:
        raise ValueError(f"the recipe names an optimizer: give --lrs for {tuning}")
    method, _ = methods_of(made.model.tuning.to_dict())
    return default_rate(method)


def _cell(axes: Axes, draft: Draft, read: versions.Versions) -> Cell:
    trainer = draft.settings["trainer"]
    reads = [draft.settings["model"], draft.settings["data"], *_callbacks(trainer)]
    files, machine = read.of(reads), versions.environment(trainer.get("accelerator"))
    settings = {**draft.settings, "files": files, **machine}

    def run(rate: float | None, seed: int) -> Run:
        given = () if rate is None else ("--model.lr", repr(rate))
        told = (*given, "--seed_everything", str(seed), "--trainer.devices", "1")
        everything = {**settings, "rate": rate, "seed": seed}
        words = ("--config", axes.recipe, *draft.arguments, *told)
        return Run(draft.tuning, draft.rank, rate, seed, axes.recipe, words, everything)

    runs = {rate: [run(rate, seed) for seed in axes.seeds] for rate in draft.rates}
    return Cell(draft.tuning, draft.rank, draft.made, runs)


def _callbacks(trainer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings of the callbacks, but for the folders that they write to."""
    for callback in trainer.get("callbacks") or []:
        arguments = callback.get("init_args") or {}
        yield {key: value for key, value in arguments.items() if key != "dirpath"}

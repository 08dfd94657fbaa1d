"""`litflora fit | validate | test | predict`: LightningCLI with recipes by name and `--adapter`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import warnings
from argparse import SUPPRESS, Action
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import yaml
from jsonargparse import ActionConfigFile, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from .. import classification, datamodules, segmentation
from ..adapters.replacing import replacing
from ..module import TuningModule
from ..processes import ending_together
from . import guards, recipes, resume, run_lock
from .mistakes import explain

# jsonargparse knows a class by its short name once it has been imported.
SHORT_NAMES = (
    classification.ClassificationModule,
    segmentation.SegmentationModule,
    *(getattr(datamodules, name) for name in datamodules.__all__),
)

# ${...} in a recipe counts from the file's root, not from the subcommand it is parsed under.
set_parsing_settings(omegaconf_absolute_to_relative_paths=True)


# What Lightning says of every run, whatever the person did.
_CHATTER = (
    ".*isinstance.treespec, LeafSpec",
    ".*args parameter is intended to run from within Python",
    ".*smaller than the logging interval",
    ".*does not have many workers",
    ".*WeightAveraging doesn't support sharding",
    ".*returned a view tensor",  # which nobody writes into
    ".*dirpath has changed",  # a run that goes on from a file is a new version: it always has
    ".*exists and is not empty",  # of a run that is resumed it always does
)


class RecipeAction(ActionConfigFile):
    """``--config`` that takes a file, the name of a shipped recipe, or YAML itself."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        """Finds the recipe; what goes wrong inside it says which it was."""
        try:
            config = values if _inline(values) else _readable(recipes.find(values))
            super().__call__(parser, cfg, config, option_string)
        except (TypeError, argparse.ArgumentError) as error:
            if not _inline(values):
                error.add_note(values)
            raise


class AdapterAction(Action):
    """``--adapter`` that brings the model and data a saved adapter was trained with."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        """Applies the folder's metadata like a config file: what comes later overrides it."""
        config, parser.saved_classes = adapter_config(values)
        ActionConfigFile.apply_config(parser, cfg, "config", json.dumps(config))


class ResumeAction(Action):
    """``--resume`` that goes on with a run, in its folder."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        """Applies the run's own config, with its newest good checkpoint: what comes later wins."""
        parser.resumed = Path(values)
        resume.lock(parser.resumed)
        config, parser.start = resume.run_config(parser.resumed)
        ActionConfigFile.apply_config(parser, cfg, "config", yaml.safe_dump(config))


def adapter_config(folder: str) -> tuple[dict[str, Any], list[str]]:
    """The model and data of a saved adapter, as a config, and the names of its classes.

    Raises:
        ValueError: If the adapter was not saved by a litflora run.
    """
    from ..adapters import read_config

    metadata = read_config(folder).get("metadata") or {}
    if "model" not in metadata:
        raise ValueError(
            f"{folder} does not say which model and data it was trained with: it was not saved by "
            "`litflora fit`\ngive them by --config and the folder by --model.init_args.adapter"
        )
    model = metadata["model"]
    model["init_args"] = {**model["init_args"], "adapter": str(folder)}
    config = {key: metadata[key] for key in ("model", "data") if metadata.get(key)}
    return config, metadata.get("class_names", [])


class RecipeParser(LightningArgumentParser):
    """LightningCLI's parser with recipe names; abbreviated options are typing errors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, allow_abbrev=False)
        self.saved_classes: list[str] = []  # those of the adapter that --adapter names
        self.resumed: Path | None = None  # the run that --resume names
        self.start: resume.Start | None = None  # the checkpoint that was found in it

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Swaps in the action that knows recipes."""
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = RecipeAction
            kwargs["help"] = "A YAML file or a shipped recipe's name; later ones override."
        return super().add_argument(*args, **kwargs)


class SaveConfig(SaveConfigCallback):
    """Saves the config where the run has a folder to itself.

    Attributes:
        folder: The folder that this process has saved to: another process's may be beside it.
    """

    folder: ClassVar[Path | None] = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves once, whole, and never over another run's config."""
        folder = own_folder(trainer)
        if folder is None:
            return
        path = folder / "config.yaml"
        mine = trainer.is_global_zero and not path.exists()
        with replacing(path) if mine else nullcontext(path) as file:
            self.config_filename = file.name
            super().setup(trainer, pl_module, stage)
        if mine:
            run_lock.take(folder)
        SaveConfig.folder = folder


class LitFloraCLI(LightningCLI):
    """LightningCLI for one command, with what all recipes share as defaults.

    Args:
        command: "fit", "validate", "test" or "predict"; None builds model and data alone.
        args: What follows on the command line.
        watching: Callbacks that a program adds; a recipe does not see them.
    """

    def __init__(
        self, command: str | None, args: list[str], watching: Sequence[Callback] = ()
    ) -> None:
        self.command = command
        self.watching = watching
        super().__init__(
            TuningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            trainer_defaults=trainer_defaults(command, args),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=RecipeParser,
            parser_kwargs={"prog": "litflora", "parser_mode": "omegaconf+", "exit_on_error": False},
            args=[command, *args] if command else args,
            run=command is not None,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """The command asked for: parsers for all would make every start slower."""
        return {self.command: LightningCLI.subcommands()[self.command]} if self.command else {}

    def add_arguments_to_parser(self, parser: RecipeParser) -> None:
        """The data tell the model its classes; photos without labels leave it to the adapter."""
        classes = {
            "num_classes": lambda told: told or len(parser.saved_classes),
            "class_names": lambda told: told or parser.saved_classes,
        }
        for key, compute in classes.items():
            target = f"model.init_args.{key}"
            parser.link_arguments(f"data.{key}", target, compute, apply_on="instantiate")
        if self.command == "fit":
            told = "Folder of a run to go on with, from its newest good checkpoint."
            parser.add_argument("--resume", action=ResumeAction, default=SUPPRESS, help=told)
        else:
            told = "Folder of a saved adapter: brings the model and data it was trained with."
            parser.add_argument("--adapter", action=AdapterAction, default=SUPPRESS, help=told)

    def _parse_ckpt_path(self) -> None:
        """Leaves the config as it is: Lightning would let the checkpoint's settings win."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer | None:
        """Adds the callbacks that every run has, unless the recipe brings or bans its own."""
        if self.command is None:
            return None
        config = self.config_init[self.command].trainer
        self.trainer_defaults["callbacks"] = default_callbacks(config, self.command)
        if self.resumed is not None:  # the config of the first start is kept
            self.save_config_callback = None
        try:
            trainer = super().instantiate_trainer(**{"plugins": guards.plugins(config), **kwargs})
        except RuntimeError as error:
            if "more than one stateful callback" not in str(error):
                raise
            kind = str(error).split("`")[1]
            raise ValueError(f"trainer.callbacks has {kind} twice: leave one of them out") from None
        trainer.callbacks[:0] = self.watching  # first: checkpoints stand at the end
        return trainer

    @property
    def resumed(self) -> Path | None:
        """The folder of the run that goes on."""
        return self._parser(self.command).resumed

    def _run_subcommand(self, subcommand: str) -> None:
        config = self.config_init[subcommand]
        if config.get("ckpt_path") == "last":
            self._parser(subcommand).start = found = last_checkpoint(self.trainer)
            config.ckpt_path = found.path
        if subcommand == "predict":  # callbacks write them, and all of them may fill the memory
            config.return_predictions = False
        step = self._first_step(config.get("ckpt_path"))
        first = self.trainer.is_global_zero
        if self.resumed is not None:
            resume.check_folder(self.resumed, own_folder(self.trainer))
        if self.resumed is not None and first:
            resume.prepare(self.resumed, self.trainer.logger, step)
        new = first and self.resumed is None
        folder = own_folder(self.trainer) if new else None
        with removed_on_mistake(folder), ending_together(self.trainer):
            super()._run_subcommand(subcommand)

    def _first_step(self, path: str | None) -> int:
        """The step of the checkpoint to start from, once that is known to be good; else 0."""
        if path is None or path in ("best", "hpc", "registry"):
            return 0
        found = self._parser(self.command).start
        start = found if found and found.path == path else resume.examine(path)
        if self.command == "fit":
            # A run that was killed before it wrote its adapter has that to do.
            if self.resumed is None or resume.has_adapter(self.resumed):
                resume.check_unfinished(start, self.trainer.max_epochs, self.trainer.max_steps)
            for line in resume.differences(start, self.model, self.datamodule):
                resume.tell(line)
        return start.steps


def run(command: str, args: list[str], watching: Sequence[Callback] = ()) -> LitFloraCLI:
    """Runs fit, validate, test or predict, with callbacks that watch; returns what has run."""
    _quieten()
    if command != "fit":  # only a fit goes on with the callbacks of a checkpoint
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint")
    with run_lock.released():
        return LitFloraCLI(command, args, watching)


def build(args: list[str]) -> LitFloraCLI:
    """Makes the model, without its network, and the data that ``args`` describe; runs nothing."""
    _quieten()
    return LitFloraCLI(None, args)


def _quieten() -> None:
    for chatter in _CHATTER:
        warnings.filterwarnings("ignore", message=chatter)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def trainer_defaults(command: str | None, args: list[str]) -> dict[str, Any]:
    """Runs go to ``runs/<recipe, or command>/version_N``, with a CSV log."""
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {
            "save_dir": "${...default_root_dir}",
            "name": _first_config(args) or command,
            "flush_logs_every_n_steps": 1,  # rows are few, and a killed run loses those not written
        },
    }
    return {
        "default_root_dir": "runs",
        "logger": logger,
        "log_every_n_steps": 10,
        "enable_model_summary": False,  # the opening says what trains, `inspect` which weights
    }


def _first_config(args: list[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    for config in parser.parse_known_args(args)[0].config:
        if not _inline(config):
            return Path(config).stem if Path(config).is_file() else config.removesuffix(".yaml")
    return None


def _readable(path: Path) -> str:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no recipe: it is not text in UTF-8") from None
    return str(path)


def _inline(config: str) -> bool:
    return any(mark in config for mark in ("{", "\n", ": "))


def default_callbacks(trainer: Any, command: str | None = None) -> list[Callback]:
    """What every run has; the progress bar unless there is another or none is wanted.

    Args:
        trainer: The trainer's config.
        command: A fit is guarded, and can go on after whatever happens to it.
    """
    from .. import callbacks

    found: list[Callback] = []
    shown = trainer.enable_progress_bar is not False and not trainer.barebones
    if shown and not any(isinstance(each, ProgressBar) for each in trainer.callbacks or ()):
        found.append(callbacks.RateProgressBar())  # first, so that it is gone when others print
    found += [callbacks.Opening(), callbacks.AdapterFolder()]
    if command == "fit":
        found += guards.callbacks(trainer)
    return found


def last_checkpoint(trainer: Trainer) -> resume.Start:
    """The newest good checkpoint that any run of this recipe has left."""
    folder = own_folder(trainer)
    runs = Path(trainer.default_root_dir) if folder is None else folder.parent
    folders = dict.fromkeys(path.parent for path in resume.checkpoints(runs))  # newest first
    found = next(filter(None, map(resume.newest_checkpoint, folders)), None)
    if found is None:
        raise FileNotFoundError(f"there is no checkpoint below {runs}: give --ckpt_path a file")
    return found


def _check_writable(folder: Path) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"no run can be written below {folder}: set trainer.default_root_dir")


def own_folder(trainer: Trainer) -> Path | None:
    """The folder that this run has to itself; other loggers share theirs, or have none."""
    logger = trainer.logger
    return Path(logger.log_dir) if isinstance(logger, CSVLogger | TensorBoardLogger) else None


@contextmanager
def removed_on_mistake(folder: Path | None) -> Iterator[None]:
    """Leaves no run folder behind if a mistake ends a run before its first checkpoint."""
    if folder is None:
        yield
        return
    if (folder / "config.yaml").exists():
        raise FileExistsError(
            f"{folder} holds an earlier run: go on with it by litflora fit --resume {folder},\n"
            "or change or drop trainer.logger.init_args.version"
        )
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    _check_writable(next(path for path in folder.absolute().parents if path.exists()))
    SaveConfig.folder = None
    try:
        yield
    except Exception as error:
        # A run that was started at the same time may have made the folder its own.
        mine = SaveConfig.folder == folder or not (folder / "config.yaml").exists()
        kept = [*folder.rglob("*.ckpt"), *folder.rglob("*.pt")]
        if explain(error) and mine and folder in missing and not kept:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in missing[1:]:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        raise

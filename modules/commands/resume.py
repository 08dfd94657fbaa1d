"""Checkpoints to go on from: which of a run's is good, and what has changed since it was made."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger

from ..adapters import AdapterError, read_config
from ..adapters.folder import WEIGHTS, read_tensors
from ..adapters.replacing import leftovers, remove
from . import run_lock
from .metrics_file import go_on_with_metrics

Checkpoint = dict[str, Any]


@rank_zero_only
def tell(line: str) -> None:
    """Prints a line, in the first process alone."""
    print(line, flush=True)


@rank_zero_only
def lock(run: Path) -> None:
    """Keeps other processes than those of this command from going on with a run.

    Raises:
        FileNotFoundError: If the folder is not one of a run.
        ValueError: If another process trains it.
    """
    _check_is_run(run)
    run_lock.take(run)


def _check_is_run(run: Path) -> None:
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(
            f"there is no {run / 'config.yaml'}: --resume takes the folder of a run, as in "
            "runs/quickstart/version_0"
        )


def run_config(run: Path) -> tuple[dict[str, Any], Start | None]:
    """The config of a run, to be parsed again so that it goes on in its own folder.

    Returns:
        The config, and the checkpoint that it names, if the run has any.

    Raises:
        FileNotFoundError: If the folder is not one of a run.
        ValueError: If its config or all its checkpoints are damaged, or a finished one has none.
    """
    _check_is_run(run)
    config = _read_config(run / "config.yaml")
    logger = config["trainer"]["logger"]
    first = logger[0] if isinstance(logger, list) else logger
    if not isinstance(first, dict):
        raise ValueError(f"{run} cannot be gone on with: trainer.logger was {logger}, and no class")
    # The folder may have moved, and is under this name wherever the command is given.
    place = {"save_dir": str(run.parent), "name": "", "version": run.name}
    first["init_args"] = {**(first.get("init_args") or {}), **place}
    found = newest_checkpoint(run)
    if found is None and checkpoints(run):
        raise ValueError(f"no checkpoint below {run} can be read: start anew, in another folder")
    if found is None and has_adapter(run):
        raise ValueError(f"{run} is finished, and its checkpoints are gone: start another run")
    return {**config, "ckpt_path": found and found.path}, found


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):
        config = None
    # ckpt_path is close to the end: without it, the file has been cut off.
    whole = isinstance(config, dict) and config.keys() >= {"trainer", "model", "data", "ckpt_path"}
    if not whole or not isinstance(config["trainer"], dict) or "logger" not in config["trainer"]:
        raise ValueError(f"{path} is not that of a run, or is damaged")
    return config


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below a folder, the newest first, without what a killed run was writing."""
    found = [path for path in folder.rglob("*.ckpt") if path.is_file() and path.name[0] != "."]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


@dataclass(frozen=True)
class Start:
    """What there is to know of a checkpoint before a run starts from it, without its tensors.

    Attributes:
        path: The file.
        steps: Steps of the optimizer behind it.
        epochs: Whole epochs behind it.
        trains: Whether a fit can go on from it.
        settings: The hyper-parameters of "model" and "data".
    """

    path: str
    steps: int
    epochs: int
    trains: bool
    settings: dict[str, Any]


def newest_checkpoint(run: Path) -> Start | None:
    """The good checkpoint of a run that has come furthest; says which it passes over.

    The time of a file does not tell: copies lose it, and last and best may have the same.
    """
    found: list[tuple[Any, Start]] = []
    for path in checkpoints(run):
        with _passing_over():
            start = _start(str(path))
            rank = start.steps, path.stat().st_mtime, path.stem == "last"
            found += [(rank, start)] if start.trains else []
    for _, start in sorted(found, key=itemgetter(0), reverse=True):
        with _passing_over():
            _check_sums(start.path)
            return start
    return None


@contextmanager
def _passing_over() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        tell(f"passed over: {error}")


def examine(path: str) -> Start:
    """Reads a checkpoint to start from, all of it.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is torn, or something else.
    """
    start = _start(path)
    _check_sums(path)
    return start


def open_checkpoint(path: str) -> Checkpoint:
    """Opens a checkpoint of litflora, whose tensors are read where they are used.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is torn, or something else; sums are not checked.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    with _named(path):
        mapped = zipfile.is_zipfile(path)  # other files, as torch once wrote, cannot be
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        state = checkpoint["state_dict"]
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no checkpoint of litflora: its state_dict is no dict")
    return checkpoint


def _start(path: str) -> Start:
    checkpoint = open_checkpoint(path)
    names = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
    with _named(path):
        # One of weights alone does not say how far it has come.
        loops = checkpoint.get("loops")
        return Start(
            path=path,
            steps=checkpoint.get("global_step", 0),
            epochs=loops["fit_loop"]["epoch_progress"]["current"]["processed"] if loops else 0,
            trains="optimizer_states" in checkpoint,
            settings={kind: checkpoint.get(name) for kind, name in names.items()},
        )


def _check_sums(path: str) -> None:
    if zipfile.is_zipfile(path):
        with _named(path), zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(f"the checksum of {damaged} does not hold")


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Whatever is raised by a file that is none of ours names it."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is damaged or no checkpoint of litflora: {reason}") from error


def check_unfinished(start: Start, max_epochs: int | None, max_steps: int) -> None:
    """Raises if a fit has nothing left to do.

    Args:
        start: The checkpoint.
        max_epochs: The length of the fit in epochs, None or -1 if it has none.
        max_steps: The length of the fit in steps, -1 if it has none.
    """
    if max_epochs is not None and 0 < max_epochs <= start.epochs:
        raise ValueError(
            f"{start.path} has had {start.epochs} epochs already: raise trainer.max_epochs above "
            f"{max_epochs}"
        )
    if 0 < max_steps <= start.steps:
        raise ValueError(
            f"{start.path} has had {start.steps} steps already: raise trainer.max_steps above "
            f"{max_steps}"
        )


def has_adapter(run: Path) -> bool:
    """Whether a fit has left its adapter, whole."""
    return any(_is_adapter(folder) for folder in run.glob("adapter*"))


def _is_adapter(folder: Path) -> bool:
    try:
        read_config(folder)
        read_tensors(folder / WEIGHTS)
    except AdapterError:
        return False
    return True


def check_folder(run: Path, folder: Path | None) -> None:
    """Raises if a run that goes on would write to another folder, or none, instead of its own."""
    if folder is None or folder.resolve() != run.resolve():
        raise ValueError(f"{run} goes on in its own folder: drop the options that move its log")


def prepare(run: Path, logger: Any, step: int) -> None:
    """Readies the folder of a run that goes on, and says from where.

    Args:
        run: The folder.
        logger: The logger of the run.
        step: The step that it goes on from, 0 if it had saved nothing.
    """
    for folder in (run, run / "checkpoints"):
        for path in leftovers(folder) if folder.is_dir() else []:
            remove(path)
    if isinstance(logger, CSVLogger) and (aside := go_on_with_metrics(logger, step)):
        tell(f"the log so far is kept as {aside}")
    where = f"goes on after step {step}" if step else "starts anew: it had saved nothing"
    tell(f"resume   {run} {where}")


def differences(start: Start, model: Any, data: Any) -> list[str]:
    """What model and data are given otherwise than when the checkpoint was made, a line each."""
    given = {"model": model, "data": data}
    lines = []
    for name, module in given.items():
        both = start.settings[name], getattr(module, "hparams", {})
        old, new = (dict(_flat(name, each or {})) for each in both)
        lines += [
            f"{key} is {new[key]!r}, and was {old[key]!r} when the checkpoint was made"
            for key in old.keys() & new.keys()
            if old[key] != new[key]
        ]
    return sorted(lines)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        if not str(key).startswith("_"):
            yield from _flat(f"{name}.{key}", inner)

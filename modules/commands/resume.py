"""Checkpoints to go on from: which of a run's is good, and what has changed since it was made."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger

from ..adapters.replacing import leftovers, remove
from .metrics_file import go_on_with_metrics

Checkpoint = dict[str, Any]


@rank_zero_only
def tell(line: str) -> None:
    """Prints a line, in the first process alone."""
    print(line, flush=True)


def run_config(run: Path) -> dict[str, Any]:
    """The config of a run, to be parsed again so that it goes on in its own folder.

    Raises:
        FileNotFoundError: If the folder is not one of a run.
    """
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(
            f"there is no {run / 'config.yaml'}: --resume takes the folder of a run, as in "
            "runs/quickstart/version_0"
        )
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    logger = config["trainer"]["logger"]
    first = logger[0] if isinstance(logger, list) else logger
    if not isinstance(first, dict):
        raise ValueError(f"{run} cannot be gone on with: trainer.logger was {logger}, and no class")
    # The folder may have moved, and is under this name wherever the command is given.
    first["init_args"] |= {"save_dir": str(run.parent), "name": "", "version": run.name}
    found = newest_checkpoint(run)
    if found is None and checkpoints(run):
        raise ValueError(f"no checkpoint below {run} can be read: start anew, in another folder")
    return {**config, "ckpt_path": found and str(found)}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below a folder, the newest first, without what a killed run was writing."""
    found = [path for path in folder.rglob("*.ckpt") if path.is_file() and path.name[0] != "."]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint below a folder that a fit can go on from; says which it passes over."""
    for path in checkpoints(folder):
        try:
            whole = "optimizer_states" in read_checkpoint(str(path))
        except ValueError as error:
            tell(f"passed over: {error}")
            continue
        if whole:
            return path
    return None


def read_checkpoint(path: str) -> Checkpoint:
    """Opens a checkpoint of litflora.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is torn, or something else.
    """
    import torch

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"the checksum of {damaged} does not hold")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["state_dict"]
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is damaged or no checkpoint of litflora: {reason}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no checkpoint of litflora: its state_dict is no dict")
    return checkpoint


def check_unfinished(
    path: str, checkpoint: Checkpoint, max_epochs: int | None, max_steps: int
) -> None:
    """Raises if a fit has nothing left to do.

    Args:
        path: The checkpoint's file.
        checkpoint: What is in it.
        max_epochs: The length of the fit in epochs, None or -1 if it has none.
        max_steps: The length of the fit in steps, -1 if it has none.
    """
    # One of weights alone does not say how far it has come.
    loops = checkpoint.get("loops")
    epochs = loops["fit_loop"]["epoch_progress"]["current"]["processed"] if loops else 0
    if max_epochs is not None and 0 < max_epochs <= epochs:
        raise ValueError(
            f"{path} has had {epochs} epochs already: raise trainer.max_epochs above {max_epochs}"
        )
    steps = checkpoint.get("global_step", 0)
    if 0 < max_steps <= steps:
        raise ValueError(
            f"{path} has had {steps} steps already: raise trainer.max_steps above {max_steps}"
        )


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
    if isinstance(logger, CSVLogger):
        go_on_with_metrics(logger, step)
    where = f"goes on after step {step}" if step else "starts anew: it had saved nothing"
    tell(f"resume   {run} {where}")


def differences(checkpoint: Checkpoint, model: Any, data: Any) -> list[str]:
    """What model and data are given otherwise than when the checkpoint was made, a line each."""
    pairs = {
        "model": (checkpoint.get("hyper_parameters"), model),
        "data": (checkpoint.get("datamodule_hyper_parameters"), data),
    }
    lines = []
    for name, (before, module) in pairs.items():
        old, new = (
            dict(_flat(name, each or {})) for each in (before, getattr(module, "hparams", {}))
        )
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

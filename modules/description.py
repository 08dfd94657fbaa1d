"""What makes a module again: its class path and arguments, as values that a file can hold."""

from __future__ import annotations

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import instantiate_module

from . import adapters
from .adapters import PerModule, Tuning


def describe(module: Any, paths: tuple[str, ...]) -> dict[str, Any]:
    """Class path and init arguments of anything with ``hparams``.

    Args:
        module: A LightningModule or LightningDataModule that saves its hyper-parameters.
        paths: Names of the arguments that may hold a path, to be made absolute.
    """
    init_args = {k: plain(v) for k, v in module.hparams.items() if not k.startswith("_")}
    for key in paths:
        if init_args.get(key) is not None and os.path.exists(init_args[key]):
            init_args[key] = os.path.abspath(init_args[key])
    return {"class_path": path_of(type(module)), "init_args": init_args}


def plain_hyperparameters(module: Any) -> dict[str, Any]:
    """The hyper-parameters of a module made in Python, as the command line would have them.

    A checkpoint can hold these, and ``load_from_checkpoint`` makes the module from them.
    """
    values = {key: plain(value) for key, value in module.hparams.items()}
    values["_class_path"] = path_of(type(module))
    values["_instantiator"] = path_of(instantiate_module)
    return values


def foreign_arguments(module: Any) -> list[str]:
    """Hyper-parameters that the module's own class does not take."""
    taken = inspect.signature(type(module).__init__).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return []
    return [key for key in module.hparams if key not in taken and not key.startswith("_")]


def path_of(thing: Any) -> str:
    """The dotted name that imports a class or function."""
    public = getattr(adapters, thing.__name__, None) is thing  # not where it happens to be defined
    module = adapters.__name__ if public else thing.__module__
    return f"{module}.{thing.__qualname__}"


def plain(value: Any) -> Any:
    """A tuning as class path and arguments, a path as text, anything else as it is."""
    if isinstance(value, PerModule):
        modules = {name: plain(tuning) for name, tuning in value.modules.items()}
        return {"class_path": path_of(PerModule), "init_args": {"modules": modules}}
    if isinstance(value, Tuning):
        settings = dataclasses.asdict(value)
        for key in ("targets", "exclude"):
            named = settings.get(key)
            if any(isinstance(t, type) for t in (named if isinstance(named, list) else [named])):
                raise ValueError(f"{key}: a checkpoint holds no classes; give a keyword or a glob")
        return {"class_path": path_of(type(value)), "init_args": settings}
    return str(value) if isinstance(value, Path) else value

"""Tells a person's mistake from a bug, and says the mistake in at most three lines.

jsonargparse nests an error once for every level of the config, Lightning and torch wrap those of
worker processes; what a person needs is the innermost: which key, what is wrong, what would do.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from types import TracebackType

# Only errors that litflora or Lightning raise themselves speak to a person: the same types out of
# torch or the standard library are bugs, and bugs keep their traceback.
_SPEAKERS = ("litflora", "lightning")
_SPOKEN = (ValueError, OSError, ImportError, FloatingPointError)

# A disk that is full, not the person's, or takes no such name: no bug, whoever wrote to it.
_DISK = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG),
    *(errno.EDQUOT, errno.EFBIG, errno.ENOSPC),
)

_CLASS = re.compile(
    r"Problem with given class_path '([^']+)'|expects a .*class_path='([^']+)'", re.S
)
_UNKNOWN = re.compile(r"(?:option|arguments:) '?(?:--)?([\w.]+)|Option '([\w.]+)' is not accepted")
_WORKER = re.compile(
    r'Caught (\w+) in DataLoader worker.*File "(.*?)".*\n(?:[\w.]+\.)?\1: (.*)', re.S
)
_PLACES = {
    "model.init_args": ("ClassificationModule", "SegmentationModule"),
    "model.init_args.tuning.init_args": ("FLoRA", "LoRA"),
    "data.init_args": (
        "datamodules.ImageFolderDataModule",
        "datamodules.VisionDataModule",
        "datamodules.MaskFolderDataModule",
    ),
}
# What ends a run and is nobody's mistake, by what torch says of it, and what helps.
_MISFORTUNES = {
    r"out of memory|can't allocate memory": (
        "memory ran out; three settings help:\n"
        "--data.init_args.batch_size HALF --trainer.accumulate_grad_batches 2, "
        "--model.init_args.activation_checkpointing blocks,\n--trainer.precision bf16-mixed"
    ),
    r"DataLoader worker .*(exited unexpectedly|killed by signal)": (
        "a process that loads data was killed, most likely since memory ran out:\n"
        "lower data.init_args.num_workers, and go on with litflora fit --resume RUN"
    ),
}
# What Lightning leaves out.
_REMEDIES = {"No supported gpu backend found!": " Use --trainer.accelerator cpu"}
_TOP_LEVEL = ("config", "trainer", "model", "data", "adapter", "ckpt_path", "seed_everything")


def explain(error: BaseException) -> str | None:
    """What a person got wrong, in a few lines; None if the error is a bug."""
    chain = list(_causes(error))
    if isinstance(error, argparse.ArgumentError):
        return _clip(_parsing(chain))
    for each in chain:
        said = _said(each)
        if said is not None:
            own = _origin(each).startswith("litflora")
            return _clip(said, 12 if own else 3)  # a check of files lists those at fault
        if not _origin(each).startswith("jsonargparse"):  # it wraps what a constructor raises
            return None
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _said(error: BaseException) -> str | None:
    origin, kind = _origin(error), type(error)
    if kind.__module__.startswith("omegaconf"):  # an ${...} that leads nowhere
        key = getattr(error, "full_key", "")
        return f"{key}: {str(error).splitlines()[0]}\ngive it a value of its own: --{key} VALUE"
    for said, helps in _MISFORTUNES.items():
        if isinstance(error, RuntimeError) and re.search(said, str(error)):
            return helps
    if worker := _WORKER.match(str(error)):
        _, path, said = worker.groups()
        return said if isinstance(error, _SPOKEN) and path in _files() else None
    if kind.__name__ == "MisconfigurationException":
        return str(error) + _REMEDIES.get(str(error), "")
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f": {error.filename}" if error.filename else ""
        return f"cannot write or read, {error.strerror}{where}"
    if isinstance(error, ImportError) and "tensorboard" in str(error):
        return "TensorBoard is not installed: pip install 'litflora[loggers]'"
    return str(error) if isinstance(error, _SPOKEN) and origin.startswith(_SPEAKERS) else None


def _origin(error: BaseException) -> str:
    """The module whose code raised the error."""
    frame: TracebackType | None = error.__traceback__
    name = ""
    while frame is not None:
        name, frame = frame.tb_frame.f_globals.get("__name__", ""), frame.tb_next
    return name


def _files() -> set[str]:
    """The source files of the speakers: of a worker's traceback no more is left than the text."""
    return {
        getattr(module, "__file__", None) or ""
        for name, module in sys.modules.items()
        if name.startswith(_SPEAKERS)
    }


def _clip(message: str, most: int = 3) -> str:
    lines = [line for line in message.strip().splitlines() if line.strip()][:most]
    return "\n".join(textwrap.shorten(line, 300, placeholder=" ...") for line in lines)


# Errors of parsing -----------------------------------------------------------------------------


def _parsing(chain: list[BaseException]) -> str:
    key: list[str] = []
    owner, allowed, last = "", "", ""
    for error in chain:
        text = str(error)
        if text == last:  # the same message is raised again at every level of the parser
            continue
        last = text
        if named := re.match(r'Parser key "([^"]+)"', text):
            key, allowed = [*key, named[1]], ""
        if path := _CLASS.match(text.removeprefix("Type ")) or _CLASS.search(text.split("\n")[0]):
            owner, allowed, key = path[1] or path[2], "", [*key, "init_args"]
        if subtypes := re.search(r"^Subtypes: \[(.*)\]$", text, re.M):
            allowed = subtypes[1]
    return _reason(chain[-1], ".".join(key), owner, allowed) + _source(chain)


def _reason(error: BaseException, key: str, owner: str, allowed: str) -> str:
    text = str(error)
    if mark := getattr(error, "problem_mark", None):
        return f"not valid YAML at line {mark.line + 1}: {getattr(error, 'problem', '')}"
    if wrong := re.match(r"Expected an? (.*)\. Got value: (.*)", text, re.S):
        return f"{key}: expected {_types(allowed or wrong[1])}, got {wrong[2]!r}"
    if absent := re.match(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        where = f"{key.removesuffix('.init_args')}.class_path"
        return (
            f"{where}: there is no {absent[2]} in {absent[1]}{_near(absent[2], _public(absent[1]))}"
        )
    if absent := re.match(r"Expected a dot import path string: (\w+)", text):
        known = _public("litflora")
        return f"{key}.class_path: there is no class {absent[1]!r}{_near(absent[1], known)}"
    if text.startswith("Unexpected config"):
        return "a recipe holds the keys trainer, model and data; this is something else"
    if "required" in text and re.search(r"\b(model|data)\b", text):
        return "no model and data to run: name a recipe, as in --config quickstart\n" + (
            "`litflora recipes` lists them; test and predict also take --adapter FOLDER"
        )
    if unknown := _UNKNOWN.search(text):
        name = unknown[1] or unknown[2]
        if owner == "torch.optim.Optimizer":  # none is named: each tuning has its own by default
            first = key.removesuffix(".init_args")
            return f"{first}: name its class first, as in --{first} AdamW --{first}.{name} VALUE"
        if owner:
            kind = owner.rpartition(".")[2]
            return f"{key}: {kind} has no option {name!r}{_near(name, _options(owner))}"
        return f"there is no option {name!r}{_near(name, _top_level(name))}"
    return f"{key}: {text}" if key and not text.startswith("Parser key") else text


def _source(chain: list[BaseException]) -> str:
    notes = [note for error in chain for note in getattr(error, "__notes__", ())]
    return f"\nin {notes[-1]}" if notes else ""


def _types(text: str) -> str:
    """Type hints as a person would write them."""
    text = re.sub(r"<class '([^']+)'>", r"\1", text).replace("NoneType", "null")
    text = re.sub(r"typing\.Literal\[([^\]]+)\]", r"\1", text)
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)
    return re.sub(r", (?![^\[]*\])", " or ", text)  # not the comma of dict[str, int]


def _near(name: str, known: Iterable[str]) -> str:
    spelling = {each.lower(): each for each in known}
    if len(spelling) == 1 and next(iter(spelling)).endswith(f".{name.rpartition('.')[2].lower()}"):
        return f"; did you mean {next(iter(spelling.values()))!r}?"
    if near := get_close_matches(name.lower(), spelling, n=1, cutoff=0.5):
        return f"; did you mean {spelling[near[0]]!r}?"
    return f"\nit has {', '.join(spelling.values())}" if spelling else ""


def _public(path: str) -> list[str]:
    module = importlib.import_module(path)
    return list(getattr(module, "__all__", vars(module)))


def _options(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    found = {}
    for cls in kind.__mro__:
        if "__init__" in vars(cls):
            found |= inspect.signature(cls.__init__).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in found.values()):
                break
    return [name for name, p in found.items() if name != "self" and p.kind is not p.VAR_KEYWORD]


def _top_level(name: str) -> list[str]:
    last = name.rpartition(".")[2]
    for place, owners in _PLACES.items():  # a person may give the last part of a name alone
        if any(last in _options(f"litflora.{owner}") for owner in owners):
            return [f"{place}.{last}"]
    if not name.startswith("trainer."):
        return [key + "." + name.partition(".")[2] if "." in name else key for key in _TOP_LEVEL]
    from lightning.pytorch import Trainer

    return [f"trainer.{option}" for option in _options(f"{Trainer.__module__}.Trainer")]

"""A changed model in the files of the checkpoint that it came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Weights in other forms: they would be those of the base.
OTHERS = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors"}


def save_like(model: nn.Module, name: str, out: Path) -> dict[str, float]:
    """Writes a model with the files, keys and types of numbers of a checkpoint.

    What is no weights is copied as it is. Weights in other forms than safetensors are left out.

    Args:
        model: A model of transformers that was read from the checkpoint, and changed since.
        name: The checkpoint: a folder, or a name on the hub.
        out: The folder, which is not there yet.

    Returns:
        What rounding to its type lost of the change of each weight that has changed, as a share.

    Raises:
        ValueError: The checkpoint is not kept in safetensors files, or has other keys than the
            model.
    """
    source = _folder(name)
    files = _weight_files(source)
    state = _original_keys(model)
    keys = {key for file in files for key in _keys(source / file)}
    _refuse_lost(model, state, keys, source)
    shutil.copytree(source, out, ignore=_left_out)
    lost: dict[str, float] = {}
    for file in files:
        lost |= _write(source / file, state, out / file)
    return lost


def _folder(name: str) -> Path:
    """Where a checkpoint's files lie; of one on the hub, those that were fetched to load it."""
    from transformers.utils import cached_file

    return Path(cached_file(name, "config.json")).parent


def _weight_files(source: Path) -> list[str]:
    if (source / INDEX).is_file():
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))
    if (source / WEIGHTS).is_file():
        return [WEIGHTS]
    raise ValueError(
        f"{source} has no {WEIGHTS}: load the checkpoint in transformers, and save_pretrained it"
    )


def _left_out(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(".") or Path(name).suffix in OTHERS]


def _original_keys(model: Any) -> dict[str, Tensor]:
    """The weights by the keys of the files that they were read from, which may be older names."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, model.state_dict())


def _keys(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _refuse_lost(model: Any, state: dict[str, Tensor], keys: set[str], source: Path) -> None:
    """Raises if a weight is in no file; one that is tied to another may be."""
    written = {tensor.data_ptr() for key, tensor in state.items() if key in keys}
    lost = [k for k, t in state.items() if k not in keys and t.data_ptr() not in written]
    if lost:
        raise ValueError(
            f"no file of {source} has {lost[0]} ({len(lost)} in all), which is a weight of "
            f"{type(model).__name__}"
        )


def _write(path: Path, state: dict[str, Tensor], target: Path) -> dict[str, float]:
    """Writes a file anew; gives what rounding lost of each change, as a share of it."""
    tensors: dict[str, Tensor] = {}
    changed: dict[str, float] = {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        for key in _keys(path):
            before = file.get_tensor(key)
            exact = state.get(key, before)  # buffers that this transformers no longer keeps
            tensors[key] = exact.detach().to("cpu", before.dtype).contiguous()
            exact = exact.detach().cpu()
            if not torch.equal(exact, before.to(exact.dtype)):
                changed[key] = _lost(key, before, exact, tensors[key])
    save_file(tensors, target, metadata=metadata)
    shutil.copymode(path, target)
    return changed


def _lost(key: str, before: Tensor, exact: Tensor, after: Tensor) -> float:
    if not bool(torch.isfinite(after).all()):
        raise ValueError(f"{key} is not finite in {str(after.dtype).removeprefix('torch.')}")
    delta, error = exact - before.to(exact.dtype), exact - after.to(exact.dtype)
    return float(error.norm() / delta.norm())

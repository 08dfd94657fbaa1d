"""The two files of an adapter folder: read and checked, and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import AdapterError
from .sharded import gathered, writes

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FORMAT = 1


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the configuration of an adapter folder.

    Raises:
        AdapterError: The folder or the file is missing or not what litflora or PEFT write.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        inside = Path(folder) / "adapter"
        hint = f". Did you mean {inside}?" if (inside / CONFIG).is_file() else ""
        raise AdapterError(f"{folder} is not an adapter folder: it has no {CONFIG}{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict) or ("format" not in config and "peft_type" not in config):
        raise AdapterError(f"{path} is no adapter configuration of litflora or PEFT")
    if "format" in config:
        _check_format(path, config)
    return config


def _check_format(path: Path, config: dict[str, Any]) -> None:
    if config["format"] != FORMAT:
        raise AdapterError(
            f"{path} has format {config['format']!r}, this litflora reads {FORMAT}: update litflora"
        )
    for key, kind in (("deltas", dict), ("trained", list), ("base", dict), ("metadata", dict)):
        if not isinstance(config.get(key), kind):
            raise AdapterError(f"{path} is damaged: it has no {key!r}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        AdapterError: It is missing or damaged.
    """
    if not path.is_file():
        raise AdapterError(f"{path} is missing: an adapter folder has {WEIGHTS} and {CONFIG}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged or cut short: {error}") from None


def check_together(folder: Path, config: dict[str, Any]) -> None:
    """Raises unless the two files are those that were written together."""
    if config.get("checksum") != _checksum(folder / WEIGHTS, config):
        raise AdapterError(
            f"{folder} is damaged: its files are not those that were saved together (checksums "
            "differ). Copy the folder again, or use an earlier one"
        )


def _checksum(weights: Path, config: dict[str, Any]) -> str:
    """Binds the two files together; metadata may be edited by hand."""
    plain = {key: value for key, value in config.items() if key not in ("checksum", "metadata")}
    content = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    with weights.open("rb") as file:
        content.update(hashlib.file_digest(file, "sha256").digest())
    return content.hexdigest()


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], sharded: bool) -> None:
    """Writes both files under temporary names, then renames them.

    Args:
        folder: Where they go; a pair that is there is replaced.
        tensors: By name.
        config: Plain values; litflora's own gets a checksum.
        sharded: Whether processes hold parts of the tensors: all must call, and one writes.

    Raises:
        AdapterError: A value of the configuration is not plain.
    """
    whole = gathered(tensors)
    if sharded and not writes():
        return
    plain = {key: tensor.contiguous().clone() for key, tensor in whole.items()}
    try:
        json.dumps(config)
    except TypeError as error:
        raise AdapterError(f"metadata must be plain values: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as scratch:
        weights, text = Path(scratch) / WEIGHTS, Path(scratch) / CONFIG
        save_file(plain, weights, metadata={"format": "pt"})
        if "peft_type" not in config:
            config = {**config, "checksum": _checksum(weights, config)}
        text.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        shutil.copymode(text, weights)  # safetensors makes its file readable by the owner alone
        _swap_in(folder, (weights, text))


def _swap_in(folder: Path, files: tuple[Path, ...]) -> None:
    """Renames files into ``folder``; a pair that is there is kept until the new one is whole."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".replaced-") as aside:
        for file in files:
            if (folder / file.name).exists():
                os.replace(folder / file.name, Path(aside) / file.name)
        for file in files:
            os.replace(file, folder / file.name)

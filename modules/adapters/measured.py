"""Paths that were timed on this machine, which "auto" prefers to its rule (see `calibration`).

They lie in one small file, ``litflora/paths.json`` in the user's cache folder, or the one that the
environment variable LITFLORA_PATHS names:

    {"<device>": {"<weight>": {"<rows>": "<path>"}}}
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import warnings
from pathlib import Path

import torch

from .delta import WeightInfo
from .errors import AdapterError
from .replacing import replacing

Table = dict[str, dict[int, str]]  # weight: {rows: path}

# A layer with more than twice the rows that were timed, or less than half, is not this layer.
NEAR = 2.0

_tables: dict[str, Table] = {}  # those that have been read, by type of device


def file() -> Path:
    """The file that calibration writes and "auto" reads."""
    if "LITFLORA_PATHS" in os.environ:
        return Path(os.environ["LITFLORA_PATHS"])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "litflora" / "paths.json"


def weight_key(info: WeightInfo, rank: int, dtype: torch.dtype) -> str:
    """What the time of a layer depends on, beside its rows: ``linear 1152x384 rank 8 float32``."""
    shape = "x".join(map(str, info.shape))
    groups = f" groups {info.groups}" if info.groups > 1 else ""
    return f"{info.kind} {shape}{groups} rank {rank} {str(dtype).removeprefix('torch.')}"


def path_for(known: Table, key: str, rows: int) -> str | None:
    """The path that was the fastest for this weight and about as many rows; None if none was."""
    timed = known.get(key)
    if not timed:
        return None
    apart, path = min((abs(math.log(each / max(1, rows))), path) for each, path in timed.items())
    return path if apart <= math.log(NEAR) else None


def table(device: torch.device) -> Table:
    """What was timed on a device; read once."""
    if device.type not in _tables:
        _tables[device.type] = _parsed(_read().get(device_name(device), {}))
    return _tables[device.type]


def note(device: torch.device) -> str:
    """Says so if "auto" follows what was timed on a device; empty if not."""
    return f"as `litflora calibrate` timed them: {file()}" if table(device) else ""


def forget() -> None:
    """Makes the file be read again."""
    _tables.clear()


def check_writable() -> None:
    """Raises if the file cannot be written."""
    nearest = next(folder for folder in file().absolute().parents if folder.exists())
    if file().is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise AdapterError(f"{file()} cannot be written: let LITFLORA_PATHS name another file")


def write(device: torch.device, found: Table) -> None:
    """Adds to the file what was timed; what it says of other weights and devices stays."""
    content = _read()
    known = content.setdefault(device_name(device), {})
    for key, timed in found.items():
        known.setdefault(key, {}).update({str(rows): path for rows, path in timed.items()})
    with replacing(file()) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8")
    forget()


def device_name(device: torch.device) -> str:
    """The device's name; with the number of threads if it is a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    count = torch.get_num_threads()
    return f"{processor()} with {count} thread{'s' if count > 1 else ''}"


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name: Linux keeps it in a file, other systems tell Python."""
    text = info.read_text("utf-8", errors="replace") if info.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _read() -> dict[str, dict[str, dict[str, str]]]:
    if not file().is_file():
        return {}
    try:
        content: dict[str, dict[str, dict[str, str]]] = json.loads(file().read_text("utf-8"))
        for layers in content.values():
            _parsed(layers)
    except (ValueError, AttributeError, OSError) as error:
        warnings.warn(
            f"{file()} is damaged ({error}) and is not used: `litflora calibrate` writes it anew",
            stacklevel=2,
        )
        return {}
    return content


def _parsed(layers: dict[str, dict[str, str]]) -> Table:
    found = {key: {int(n): path for n, path in timed.items()} for key, timed in layers.items()}
    for timed in found.values():
        unknown = set(timed.values()) - {"side", "rebuilt", "merged"}
        if unknown or min(timed, default=1) < 1:
            raise ValueError(f"no rows or path: {timed}")
    return found

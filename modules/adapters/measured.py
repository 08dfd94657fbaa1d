"""Paths that were timed on this machine, which "auto" prefers to its rule (see `calibration`).

They lie in one small file, ``litflora/paths.json`` in the user's cache folder, or the one that the
environment variable LITFLORA_PATHS names:

    {"<device>, torch <version>": {"<weight>": {"<rows>": "<path>"}}}
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import tempfile
import warnings
from pathlib import Path

import torch

from .delta import COMPUTED
from .errors import AdapterError
from .replacing import replacing

Table = dict[str, dict[int, str]]  # weight: {rows: path}

# A layer with more than twice the rows that were timed, or less than half, is not this layer.
NEAR = 2.0

_tables: dict[tuple[str, int | None], Table] = {}  # those that have been read, by device


def paths_file() -> Path:
    """The file that calibration writes and "auto" reads."""
    if "LITFLORA_PATHS" in os.environ:
        return Path(os.environ["LITFLORA_PATHS"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "litflora" / "paths.json"


def nearest(timed: dict[int, str], rows: int) -> str | None:
    """The path that was timed for about as many rows; None if there were none near."""
    near = [(abs(math.log(each / max(1, rows))), path) for each, path in timed.items()]
    apart, path = min(near, default=(math.inf, None))
    return path if apart <= math.log(NEAR) else None


def timed_paths(device: torch.device) -> Table:
    """What was timed on a device; read once in a process, for the number of threads then."""
    key = (device.type, device.index)
    if key not in _tables:
        if torch.compiler.is_compiling():  # which cannot trace the reading of a file
            return {}
        _tables[key] = _parsed(_read().get(_machine(device), {}))
    return _tables[key]


def forget() -> None:
    """Makes the file be read again."""
    _tables.clear()


def check_writable() -> None:
    """Raises if the file cannot be written.

    Raises:
        AdapterError: It cannot.
    """
    try:
        path = paths_file()
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is no plain file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (OSError, RuntimeError) as error:
        raise AdapterError(
            f"the timed paths cannot be written ({error}): let LITFLORA_PATHS name another file"
        ) from None


def write_timed(device: torch.device, found: Table) -> None:
    """Adds to the file what was timed; what it says of other weights and devices stays.

    A file that is damaged is put aside, as ``paths.json.damaged``.
    """
    content, path = _read(), Path(os.path.realpath(paths_file()))
    if path.exists() and not content:
        os.replace(path, path.with_name(f"{path.name}.damaged"))
    known = content.setdefault(_machine(device), {})
    for key, timed in found.items():
        known.setdefault(key, {}).update({str(rows): fastest for rows, fastest in timed.items()})
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8")
    forget()
    timed_paths(device)


def _machine(device: torch.device) -> str:
    """What timings hold for: another release of torch computes otherwise."""
    return f"{device_name(device)}, torch {torch.__version__}"


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
    """The whole file; nothing, and a warning, if it cannot be used: a hint must stop no run."""
    path: Path | str = "the file of timed paths"
    try:
        path = paths_file()
        if not path.exists():
            return {}
        content: dict[str, dict[str, dict[str, str]]] = json.loads(path.read_text("utf-8"))
        for layers in content.values():
            _parsed(layers)
    except Exception as error:
        told = str(error).partition("\n")[0][:200]
        warnings.warn(
            f"{path} is not used ({told}): `litflora calibrate` writes it anew, and LITFLORA_PATHS "
            "names another",
            stacklevel=2,
        )
        return {}
    return content


def _parsed(layers: dict[str, dict[str, str]]) -> Table:
    found = {key: {int(n): path for n, path in timed.items()} for key, timed in layers.items()}
    for timed in found.values():
        if any(path not in COMPUTED for path in timed.values()):
            raise ValueError(f"there is an unknown path in {timed}")
        if not all(1 <= rows < 2**53 for rows in timed):
            raise ValueError(f"these rows make no sense: {timed}")
    return found

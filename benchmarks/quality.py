"""Runs of the command line whose results are kept, for benchmarks of quality."""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import track


def options(settings: dict[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def litflora(jobs: int, folder: Path, *words: object) -> None:
    """Runs the command line; with several jobs, on one thread."""
    command = [sys.executable, "-m", "litflora", *map(str, words)]
    env = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
    with (folder / "log.txt").open("a") as file:
        subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT, env=env)


def once(folder: Path, go: Any) -> dict[str, float]:
    """The result of an earlier run in this folder, or else of this one."""
    done = folder / "result.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        done.write_text(json.dumps(go(folder)))
    return json.loads(done.read_text())


def at_once(jobs: int, function: Any, runs: Sequence[Any]) -> list[dict[str, float]]:
    with ThreadPoolExecutor(jobs) as pool:
        return list(track(pool.map(function, runs), total=len(runs), description="runs"))


def newest(folder: Path, name: str) -> Path:
    return max(folder.rglob(name), key=lambda path: path.stat().st_mtime)


def last(folder: Path, name: str) -> float:
    with newest(folder, "metrics.csv").open() as file:
        values = [row[name] for row in csv.DictReader(file) if row.get(name)]
    return float(values[-1])


def spread(accuracies: Iterable[float]) -> str:
    """Mean and standard deviation, and each, in percent."""
    acc = [100 * value for value in accuracies]
    deviation = statistics.stdev(acc) if len(acc) > 1 else 0.0
    each = ", ".join(f"{value:.1f}" for value in acc)
    return f"{statistics.mean(acc):.2f} ± {deviation:.2f} | {each}"


def write(path: Path, text: str) -> None:
    """Writes a table."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)

"""Kills a training at random moments, resumes it, and compares it with one that nobody disturbed.

    python benchmarks/kill.py --moments 20 --devices 1

Every other moment is one at which a checkpoint is being written. All tensors of the last checkpoint
and of the adapter must be equal bit for bit; the exit code says whether they are.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from safetensors.torch import load_file

CONFIG = """
model:
  class_path: litflora.ClassificationModule
  init_args:
    backbone: convnext_shapes
    weights: embedded
    mixup: 0.2
    tuning: {class_path: litflora.FLoRA, init_args: {rank: 2, dropout: 0.1}}
data:
  class_path: litflora.datamodules.ShapesDataModule
  init_args: {train_samples: 42, val_samples: 8, img_size: 32, batch_size: 4}
trainer:
  max_epochs: 3
  accelerator: cpu
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
    - class_path: litflora.callbacks.LastCheckpoint
      init_args: {every_n_steps: 2}
"""
RUN = "kill/version_0"
ALONE = {"OMP_NUM_THREADS": "1"}  # more threads than cores would make the numbers no others


def arguments(folder: Path, devices: int = 1) -> list[str]:
    """A fit that leaves its run in ``folder / RUN``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "kill.yaml"
    config.write_text(CONFIG)
    options = {"default_root_dir": folder, "devices": devices}
    if devices > 1:
        options["strategy"] = "ddp"
    shown = [f"--trainer.{name}={value}" for name, value in options.items()]
    return ["fit", "--config", str(config), *shown]


def start(args: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a command in a session of its own, which its processes can be killed by."""
    with log.open("ab") as said:
        command = [sys.executable, "-m", "litflora", *args]
        environment = {**os.environ, **ALONE}
        return subprocess.Popen(
            command, stdout=said, stderr=said, env=environment, start_new_session=True
        )


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for a command to end well."""
    if process.wait() != 0:
        raise RuntimeError(f"exit code {process.returncode}:\n{log.read_text()}")


def kill_after(process: subprocess.Popen[bytes], run: Path, seconds: float) -> str:
    """Kills a run some time after it has begun to write its folder."""
    wait_for(process, lambda: (run / "config.yaml").is_file())
    time.sleep(seconds)
    return _kill(process, run)


def kill_while_saving(process: subprocess.Popen[bytes], run: Path, number: int) -> str:
    """Kills a run while it writes its last checkpoint for the n-th time."""
    folder = run / "checkpoints"
    count, before = 0, False

    def writing() -> bool:
        nonlocal count, before
        now = folder.is_dir() and any(folder.glob(".last.*"))
        count += now and not before
        before = now
        return now and count >= number

    wait_for(process, writing)
    return _kill(process, run)


def wait_for(process: subprocess.Popen[bytes], condition: Any) -> None:
    """Waits until something holds, or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.0005)  # a checkpoint is written within a few milliseconds


def _kill(process: subprocess.Popen[bytes], run: Path) -> str:
    if process.poll() is not None:
        return "had ended"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    torn = list((run / "checkpoints").glob(".*")) if (run / "checkpoints").is_dir() else []
    return f"killed, {'a checkpoint half written' if torn else 'nothing half written'}"


def outcome(run: Path) -> dict[str, Any]:
    """All that a run has come to, with tensors as bytes."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    found = {name: checkpoint[name] for name in kept}
    found["adapter"] = load_file(run / "adapter" / "adapter_model.safetensors")
    return apply_to_collection(found, torch.Tensor, lambda tensor: tensor.numpy().tobytes())


def is_finished(run: Path) -> bool:
    """Whether a run has left its adapter."""
    return (run / "adapter").is_dir()


def one_moment(folder: Path, devices: int, saving: int | None, seconds: float) -> str:
    """Kills a run at one moment and resumes it; says how it was killed."""
    log, run = folder / "said.txt", folder / RUN
    process = start(arguments(folder, devices), log)
    told = (
        kill_after(process, run, seconds)
        if saving is None
        else kill_while_saving(process, run, saving)
    )
    if not is_finished(run):
        finish(start(["fit", "--resume", str(run)], log), log)
    return told


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--devices", type=int, default=1, choices=(1, 2))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        process = start(arguments(whole, options.devices), whole / "said.txt")
        wait_for(process, lambda: (whole / RUN / "config.yaml").is_file())
        began = time.monotonic()
        finish(process, whole / "said.txt")
        length = time.monotonic() - began
        expected, failed = outcome(whole / RUN), 0
        print(f"undisturbed: {length:.1f} s, {expected['global_step']} steps", flush=True)
        for number in range(options.moments):
            folder = Path(scratch, str(number))
            saving = draw.randint(1, expected["global_step"] // 2) if number % 2 else None
            seconds = draw.uniform(0, 0.9 * length)  # the adapter is written after that
            told = one_moment(folder, options.devices, saving, seconds)
            equal = outcome(folder / RUN) == expected
            failed += not equal
            when = f"after {seconds:.1f} s" if saving is None else f"at save {saving}"
            print(f"{number + 1}: {when}: {told}; {'equal' if equal else 'DIFFERS'}", flush=True)
    print(f"{options.moments - failed} of {options.moments} equal, {options.devices} process(es)")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

"""The command line as the tests of it use it: in process, with small photos and a small base."""

import contextlib
import io
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from litflora.cli import main

CLASSES = ("ant", "bee", "cat")
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
SMALL = (*QUIET, "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1")
BACKBONE = "test_vit"
SIDE = 32


@dataclass
class Result:
    """What a command returned and printed."""

    code: int
    out: str
    err: str


def litflora(*args: object) -> Result:
    """Runs a command in this process. Warnings go to stderr, as they do in a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    to_strings = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    # A strategy of several processes leaves its rank in the environment, for whoever comes next.
    alone = patch.dict(os.environ)
    with alone, to_strings[0], to_strings[1], warnings.catch_warnings():
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as stop:  # --help and --version
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def litflora_process(*args: object) -> Result:
    """Runs a command in a process of its own, which can start others like it."""
    command = [sys.executable, "-m", "litflora", *map(str, args)]
    ranks = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    alone = {name: value for name, value in os.environ.items() if name not in ranks}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=alone)
    return Result(done.returncode, done.stdout, done.stderr)


def make_photos(root: Path, classes: tuple[str, ...] = CLASSES, count: int = 4) -> Path:
    """Writes ``train/<class>`` and ``test/<class>``, a colour for each class."""
    noise = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 100, (SIDE, SIDE, 3), dtype=np.uint8)
                pixels[..., label % 3] += 120
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return root


def make_masks(root: Path, count: int = 4) -> Path:
    """Writes ``<split>/images`` and ``<split>/masks``: a disc of class 1 on class 0."""
    noise = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, : 2 * SIDE]
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in range(count):
            mask = (np.hypot(y - SIDE / 2, x - noise.integers(8, 56)) < 10).astype(np.uint8)
            pixels = noise.integers(0, 100, (*mask.shape, 3), dtype=np.uint8)
            pixels[mask == 1] += 120
            Image.fromarray(pixels).save(root / split / "images" / f"{number}.jpg")
            Image.fromarray(mask).save(root / split / "masks" / f"{number}.png")
    return root


def make_base(path: Path, seed: int = 0) -> Path:
    """Writes weights of the small backbone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_file(timm.create_model(BACKBONE, num_classes=5).state_dict(), path)
    return path


def photo_args(root: Path, base: Path) -> list[str]:
    """Options that make a recipe for photos small."""
    options = {
        "model.init_args.backbone": BACKBONE,
        "model.init_args.weights": base,
        "model.init_args.img_size": SIDE,
        "data.init_args.root": root,
        "data.init_args.img_size": SIDE,
        "data.init_args.num_workers": 0,
        "data.init_args.batch_size": 4,
    }
    return [str(each) for key, value in options.items() for each in (f"--{key}", value)]


def files_below(folder: Path) -> set[str]:
    """The files and folders below a folder, by relative path."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}

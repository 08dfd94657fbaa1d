"""The finders: what they find, and that nothing else is left of a search."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from shell import QUIET, Result, files_below, litflora
from tiny import Colours, module, save_base, trainer

from litflora.adapters import FLoRA, Full, LoRA, PerModule, read_config
from litflora.callbacks import EMA, LearningRateFinder
from litflora.callbacks.lr_finder import Sweep, steepest

SMALL = (
    *QUIET,
    *("--trainer.accelerator", "cpu"),
    *("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3"),
    *("--data.train_samples", "48", "--data.val_samples", "8", "--data.batch_size", "16"),
)


def fit(folder: Path, *options: object, task: str = "classification") -> Result:
    """The embedded recipe of a task, made small."""
    named = ("fit", "--config", f"{task}/shapes", "--data.domain", "shifted", "--trainer.default_root_dir", folder)
    return litflora(*named, *options, *SMALL)


def run_of(folder: Path, task: str = "classification") -> Path:
    return folder / task / "shapes" / "version_0"


def callback(name: str, **options: Any) -> tuple[str, str]:
    """A finder in place of the recipe's, with options of its own."""
    path = f"litflora.callbacks.{name}"
    added = {"trainer": {"callbacks+": [{"class_path": path, "init_args": options}]}}
    return "--config", yaml.safe_dump(added)


def left(run: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What a run leaves: adapter, its config, and the last checkpoint but for the finder's state."""
    (saved,) = (run / "checkpoints").glob("*.ckpt")
    checkpoint = torch.load(saved, weights_only=True)
    checkpoint["callbacks"] = {
        name: state for name, state in checkpoint["callbacks"].items() if "Finder" not in name
    }
    for state in checkpoint["callbacks"].values():
        for key in [key for key in state if "path" in key or "dir" in key or "models" in key]:
            del state[key]
    return read_config(run / "adapter"), checkpoint["loops"], checkpoint


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal bit for bit, tensors too."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


# Learning rate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--config", "trainer/ema"), ("--model.head_lr", "1e-3")])
def test_a_fit_with_the_finder_is_one_with_the_rate_it_found(more, tmp_path):
    finder = callback("LearningRateFinder", min_lr=1e-5, num_training_steps=30)
    found = fit(tmp_path / "a", *more, *finder)
    assert found.code == 0, found.err
    rate = read_config(run_of(tmp_path / "a") / "adapter")["metadata"]["model"]["init_args"]["lr"]
    assert f"--model.lr {rate:g}\n" in found.out
    plain = fit(tmp_path / "b", *more, "--model.lr", rate)
    assert plain.code == 0, plain.err
    assert_same(left(run_of(tmp_path / "a")), left(run_of(tmp_path / "b")))
    # Validation before training is told as ever, and no file is left but the picture.
    assert found.out.split("val/acc")[1] == plain.out.split("val/acc")[1].replace("/b/", "/a/")
    files = files_below(tmp_path / "a") - files_below(tmp_path / "b")
    assert files == {"classification/shapes/version_0/lr_finder.png"}
    assert str(rate) in (run_of(tmp_path / "a") / "metrics.csv").read_text()

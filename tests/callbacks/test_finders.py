"""The finders: what they find, and that nothing else is left of a search."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from shell import QUIET, Result, files_below, litflora
from tiny import Colours, module, save_base, trainer

from litflora.adapters import FLoRA, Full, LoRA, PerModule, read_config
from litflora.callbacks import LearningRateFinder
from litflora.callbacks.lr_finder import Sweep, steepest
from litflora.classification import ClassificationModule

SMALL = (
    *QUIET,
    *("--trainer.accelerator", "cpu"),
    *("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3"),
    *("--data.train_samples", "48", "--data.val_samples", "8", "--data.batch_size", "16"),
)


def fit(folder: Path, *options: object, task: str = "classification") -> Result:
    """The embedded recipe of a task, made small."""
    named = (
        "fit",
        "--config",
        f"{task}/shapes",
        "--data.domain",
        "shifted",
        "--trainer.default_root_dir",
        folder,
    )
    return litflora(*named, *SMALL, *options)


def run_of(folder: Path, task: str = "classification") -> Path:
    return folder / task / "shapes" / "version_0"


def callback(name: str, **options: Any) -> tuple[str, str]:
    """A finder in place of the recipe's, with options of its own."""
    path = name if name == "ModelCheckpoint" else f"litflora.callbacks.{name}"
    added = {"trainer": {"callbacks+": [{"class_path": path, "init_args": options}]}}
    return "--config", yaml.safe_dump(added)


def left(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The adapter's config and the checkpoint, but for the state of finders."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["callbacks"] = {
        name: state for name, state in checkpoint["callbacks"].items() if "Finder" not in name
    }
    for state in checkpoint["callbacks"].values():
        for key in [key for key in state if "path" in key or "dir" in key or "models" in key]:
            del state[key]
    return read_config(run / "adapter"), checkpoint


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


# Learning rate ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(
            ("--config", "trainer/ema", "--model.head_lr", "1e-3"), marks=pytest.mark.slow
        ),
        pytest.param(
            ("--model.tuning", "Full", "--model.lr_scheduler", "null"), marks=pytest.mark.slow
        ),
    ],
)
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
    assert f",{rate}," in (run_of(tmp_path / "a") / "metrics.csv").read_text()


def test_a_search_keeps_the_ratios_of_the_groups(tmp_path):
    tuning = PerModule({"blocks": FLoRA(rank=2), "head": Full()})
    made = module(save_base(tmp_path), tuning=tuning, layer_decay=0.5, head_lr=3e-3)
    seen = []

    class Watched(LearningRateFinder):
        def lr_find(self, trainer, pl_module):
            (optimizer,) = trainer.optimizers
            optimizer.register_step_pre_hook(
                lambda *_: seen.append({g["name"]: g["lr"] for g in optimizer.param_groups})
            )
            super().lr_find(trainer, pl_module)

    run = trainer(tmp_path, callbacks=[Watched(num_training_steps=30)])
    run.fit(made, Colours(n=48))
    peaks = {group["name"]: group["initial_lr"] for group in run.optimizers[0].param_groups}
    assert len(peaks) > 3
    for rates in seen[:20:19]:  # of the search, whose first rate is the least
        for name, rate in rates.items():
            share = (
                1.0 if name.startswith("head") else rates["adapters_x0.5"] / peaks["adapters_x0.5"]
            )
            assert rate == pytest.approx(share * peaks[name]), name
    assert peaks["adapters_x0.5"] == pytest.approx(0.5 * made.lr)
    assert seen[19]["adapters_x0.5"] > 2 * seen[0]["adapters_x0.5"]


def test_the_suggestion_is_where_the_loss_falls_fastest():
    """A step down that is steepest at 3e-3, with noise, and a rise at the end."""
    rates = torch.logspace(-6, 0, 100)
    noise = 0.05 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    losses = 2 - torch.tanh(4 * (rates / 3e-3).log10()) + noise
    losses[-5:] = torch.tensor([2.0, 4, 8, 16, float("nan")])
    assert float(rates[steepest(rates, losses)]) == pytest.approx(3e-3, rel=0.4)
    with pytest.raises(ValueError, match="saw no fall of the loss between 1e-06 and 1"):
        steepest(rates, 2 + noise)
    with pytest.raises(
        ValueError,
        match=r"only 9 of the 20 points it needs: the loss diverged at a rate of 3.1e-06",
    ):
        steepest(rates[:9], losses[:9])


def test_a_step_has_the_mean_loss_of_its_batches(tmp_path, monkeypatch):
    """Two batches to a step, but one to the last of an epoch of three; Lightning halves all."""
    made, seen, found = module(save_base(tmp_path), tuning=LoRA(rank=2)), [], []

    class Watched(Sweep):
        def on_train_batch_end(self, trainer, pl_module, outputs, *rest):
            seen.append(2 * float(outputs["loss"]))
            super().on_train_batch_end(trainer, pl_module, outputs, *rest)

    def kept(*points):
        found.extend(points)
        return steepest(*points)

    monkeypatch.setattr("litflora.callbacks.lr_finder.Sweep", Watched)
    monkeypatch.setattr("litflora.callbacks.lr_finder.steepest", kept)
    run = trainer(tmp_path, accumulate_grad_batches=2, callbacks=[LearningRateFinder(1e-5)])
    run.fit(made, Colours(n=24))
    # Only its first step brings the watcher in.
    expected = [seen[0], seen[1], (seen[2] + seen[3]) / 2, seen[4], (seen[5] + seen[6]) / 2]
    assert found[1][:5].tolist() == pytest.approx(expected)
    assert 0.8 < expected[0] < 1.4  # the logarithm of three classes


MISTAKES = {
    "diverges": ({"min_lr": 1e3, "max_lr": 1e9}, (), "the loss diverged at a rate of"),
    "falls nowhere": (
        {"min_lr": 1e-12, "max_lr": 1e-11, "num_training_steps": 24},
        (),
        "saw no fall of the loss",
    ),
    "few steps": ({"num_training_steps": 5}, (), "num_training_steps must be at least 20, not 5"),
    "no range": ({"min_lr": 2.0}, (), "min_lr must lie between 0 and max_lr 1.0, not be 2.0"),
    "a cycle": (
        {},
        (
            *("--model.lr_scheduler", "OneCycleLR", "--model.lr_scheduler.max_lr", "0.1"),
            *("--model.lr_scheduler.total_steps", "9"),
        ),
        "OneCycleLR has rates of its own",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_no_rate_is_told_and_leaves_nothing(name, tmp_path):
    options, more, expected = MISTAKES[name]
    result = fit(tmp_path / "runs", *more, *callback("LearningRateFinder", **options))
    assert result.code == 2
    assert expected in result.err
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


# Batch size -------------------------------------------------------------------------------------


def test_a_fit_with_the_finder_is_one_with_the_size_it_found(tmp_path):
    """On a CPU nothing but the bound ends the search."""
    whole = ("--trainer.limit_train_batches", "1.0")  # the schedule's length depends on the size
    finder = callback("BatchSizeFinder", max_val=20)
    found = fit(tmp_path / "a", *whole, *finder, "--data.batch_size", "6")
    assert found.code == 0, found.err
    assert "batches  of 16; images/s by size: " in found.out
    assert [f"({size})" in found.out for size in (2, 4, 8, 16, 32)] == 4 * [True] + [False]
    plain = fit(tmp_path / "b", *whole)
    assert plain.code == 0, plain.err
    assert_same(left(run_of(tmp_path / "a")), left(run_of(tmp_path / "b")))
    files = files_below(tmp_path / "a") - files_below(tmp_path / "b")
    assert files == {"classification/shapes/version_0/batch_size_finder.png"}


@pytest.fixture
def memory(monkeypatch):
    """Sets how many images fit in memory."""

    def holds(most):
        step = ClassificationModule.training_step

        def limited(self, batch, batch_idx):
            if len(batch[0]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return step(self, batch, batch_idx)

        monkeypatch.setattr(ClassificationModule, "training_step", limited)

    return holds


@pytest.mark.parametrize(
    ("mode", "most", "size"),
    [("power", 13, 8), pytest.param("binsearch", 13, 13, marks=pytest.mark.slow)],
)
def test_memory_ends_the_search(mode, most, size, memory, tmp_path):
    memory(most)
    found = fit(tmp_path, *callback("BatchSizeFinder", mode=mode))
    assert found.code == 0, found.err
    assert f"batches  of {size}; " in found.out
    told = read_config(run_of(tmp_path) / "adapter")["metadata"]["data"]["init_args"]
    assert told["batch_size"] == size


def test_the_training_set_ends_the_search(tmp_path):
    small = ("--data.train_samples", "12")
    found = fit(tmp_path, *callback("BatchSizeFinder"), *small)
    assert found.code == 0, found.err
    assert "batches  of 12; " in found.out
    assert [f"({size})" in found.out for size in (2, 4, 8, 12, 16, 32)] == 4 * [True] + 2 * [False]


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_memory_that_holds_nothing_is_told_and_leaves_nothing(mode, memory, tmp_path):
    memory(0)
    result = fit(tmp_path / "runs", *callback("BatchSizeFinder", mode=mode))
    assert result.code == 2
    smallest = 1 if mode == "power" else 2
    assert f"error: a batch of {smallest} does not fit in memory\n" in result.err
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_the_sizes_of_several_processes_are_not_searched(tmp_path):
    several = ("--trainer.strategy", "ddp", "--trainer.devices", "1")
    result = fit(tmp_path / "runs", *callback("BatchSizeFinder"), *several)
    assert result.code == 2
    assert "Batch size finder is not supported with distributed strategies" in result.err


@pytest.mark.parametrize("options", [{"steps_per_trial": 1}, {"init_val": 300}])
def test_mistakes_are_told(options, tmp_path):
    result = fit(tmp_path / "runs", *callback("BatchSizeFinder", **options))
    assert result.code == 2
    assert next(iter(options)) in result.err


# Both -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=pytest.mark.slow) for task in ("segmentation", "detection")]
)
def test_both_search_one_after_the_other_for_dense_tasks(task, tmp_path):
    one = callback("BatchSizeFinder", max_val=4, steps_per_trial=2)
    other = callback("LearningRateFinder", min_lr=1e-5, max_lr=0.1, num_training_steps=24)
    found = fit(tmp_path, *one, *other, task=task)
    assert found.code == 0, found.err
    assert "batches  of 4; " in found.out
    assert "--model.lr " in found.out
    run = run_of(tmp_path, task)
    assert {"lr_finder.png", "batch_size_finder.png"} < files_below(run)


def test_a_resumed_run_goes_on_with_what_was_found(tmp_path):
    """Interrupted after an epoch, it ends as one that was not."""
    finders = (
        *callback("BatchSizeFinder", max_val=16),
        *callback("LearningRateFinder", min_lr=1e-5, num_training_steps=30),
    )
    whole = fit(tmp_path / "a", *finders, *callback("ModelCheckpoint", save_top_k=-1))
    assert whole.code == 0, whole.err
    first = next((run_of(tmp_path / "a") / "checkpoints").glob("epoch=0*.ckpt"))
    resumed = fit(tmp_path / "b", *finders, "--ckpt_path", first)
    assert resumed.code == 0, resumed.err
    assert "found by" not in resumed.out
    assert "images/s" not in resumed.out
    assert_same(*(read_config(run_of(tmp_path / name) / "adapter") for name in ("b", "a")))
    assert_same(*(weights(run_of(tmp_path / name)) for name in ("b", "a")))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["trainer/ddp_cpu", "trainer/fsdp2_cpu"])
def test_two_processes_find_one_rate(recipe, tmp_path):
    """It is that of their mean loss, and both train with it."""
    options = ["--config", "quickstart", *SMALL, *callback("LearningRateFinder", min_lr=1e-5)]
    several = ["--config", recipe]
    runs = ["--trainer.default_root_dir", str(tmp_path)]
    command = [sys.executable, "-m", "litflora", "fit", *options, *several, *runs]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    (rate,) = re.findall(r"--model.lr (\S+)", found.stdout)
    folder = tmp_path / "quickstart" / "version_0"
    told = read_config(folder / "adapter")["metadata"]["model"]["init_args"]["lr"]
    assert told == float(rate)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    (optimizer,) = saved["optimizer_states"]
    assert {group["initial_lr"] for group in optimizer["param_groups"]} == {told}
    assert not list(tmp_path.rglob(".lr_find*"))

"""What a batch holds follows from the seed and the epoch, whoever loads it."""

import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from litflora import datamodules
from litflora.datamodules import ImageFolderDataModule, ShapesDataModule
from litflora.datamodules.base import EpochSampler
from litflora.datamodules.splits import few_shot, hold_out

LABELS = [0] * 20 + [1] * 10 + [2] * 5


class Recorder(LightningModule):
    """Keeps the batches that a fit gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[tuple[int, Tensor]] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.batches.append((self.current_epoch, batch[0]))
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def epochs(data: Any, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    data.setup("fit")
    loader = data.train_dataloader()
    batches = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


def same(ours: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(ours, others, strict=True)
    return all(torch.equal(x, y) and torch.equal(i, j) for (x, i), (y, j) in pairs)


def folder(root: Path, **changes: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(root), **{"img_size": 16, "batch_size": 5, **changes})


def test_batches_do_not_depend_on_the_workers(photos: Path) -> None:
    alone = epochs(folder(photos))
    torch.manual_seed(123)  # nor on the global stream
    assert same(alone, epochs(folder(photos, num_workers=2)))


def test_batches_depend_on_the_seed(photos: Path) -> None:
    one, other = (folder(photos, seed=seed, val_fraction=0.2) for seed in (0, 1))
    assert not same(epochs(one), epochs(other))


def test_each_epoch_has_an_order_and_augmentation_of_its_own(photos: Path) -> None:
    data = folder(photos)
    data.setup("fit")
    samples = data.datasets["train"]
    first, second = (samples[epoch * len(samples)] for epoch in (0, 1))
    assert first[1:] == second[1:]  # the same image
    assert not torch.equal(first[0], second[0])
    sampler = EpochSampler(samples, num_replicas=1, rank=0)
    keys = list(sampler)
    sampler.set_epoch(1)
    later = [key - len(samples) for key in sampler]
    assert sorted(keys) == sorted(later) == list(range(len(samples)))
    assert keys != later


def test_augmentation_leaves_the_global_stream_alone(photos: Path) -> None:
    data = folder(photos)
    data.setup("fit")
    before = torch.get_rng_state()
    data.datasets["train"][0]
    assert torch.equal(before, torch.get_rng_state())


def test_lightning_tells_the_sampler_the_epoch(photos: Path, tmp_path: Path) -> None:
    module = Recorder()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", limit_val_batches=0, default_root_dir=tmp_path, **options
    )
    trainer.fit(module, datamodule=folder(photos))
    expected = epochs(folder(photos))
    assert [epoch for epoch, _ in module.batches] == sorted(epoch for epoch, _ in module.batches)
    assert all(
        torch.equal(got, wanted)
        for (_, got), (wanted, _) in zip(module.batches, expected, strict=True)
    )


def test_processes_share_an_epoch_without_overlap(photos: Path) -> None:
    data = folder(photos)
    data.setup("fit")
    samples = data.datasets["train"]
    shares = [list(EpochSampler(samples, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert set(shares[0]) | set(shares[1]) == set(range(len(samples)))
    assert len(shares[0]) == len(shares[1])


def test_hold_out_takes_the_same_share_of_each_class() -> None:
    kept, held = hold_out(LABELS, 0.2, seed=0)
    assert sorted(kept + held) == list(range(35))
    assert [[LABELS[i] for i in held].count(label) for label in range(3)] == [4, 2, 1]
    assert hold_out(LABELS, 0.2, seed=0) == (kept, held) != hold_out(LABELS, 0.2, seed=1)


def test_hold_out_leaves_a_class_its_only_image() -> None:
    assert hold_out([0, 0, 1], 0.2, seed=0)[1] in ([0], [1])
    with pytest.raises(ValueError, match="no class has more than one image"):
        hold_out([0, 1, 2], 0.2, seed=0)


def test_few_shot_is_balanced_seeded_and_nested() -> None:
    names = ["a", "b", "c"]
    chosen = few_shot(LABELS, 3, 0, names)
    assert [LABELS[i] for i in chosen] == [0] * 3 + [1] * 3 + [2] * 3
    assert set(chosen) < set(few_shot(LABELS, 5, 0, names))
    assert chosen != few_shot(LABELS, 3, 1, names)


def test_few_shot_names_the_class_that_is_too_small() -> None:
    with pytest.raises(ValueError, match=r"samples_per_class=6, but class 'c' has only 5"):
        few_shot(LABELS, 6, 0, ["a", "b", "c"])
    with pytest.raises(ValueError, match="samples_per_class=0"):
        few_shot(LABELS, 0, 0, ["a", "b", "c"])


def test_only_training_images_are_few(photos: Path) -> None:
    data = folder(photos, samples_per_class=2)
    data.setup()
    assert len(data.datasets["train"]) == 6
    assert len(data.datasets["val"]) == len(data.datasets["test"]) == 3


def test_a_mistake_in_the_data_stops_the_trainer_before_it_writes(
    photos: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=home, enable_progress_bar=False
    )
    with pytest.raises(ValueError, match="samples_per_class"):
        trainer.fit(Recorder(), datamodule=folder(photos, samples_per_class=50))
    assert not home.exists()


def test_hyperparameters_rebuild_the_datamodule() -> None:
    data = ShapesDataModule(domain="source", train_samples=7)
    assert dict(data.hparams) == dict(ShapesDataModule(**data.hparams).hparams)
    assert data.hparams["train_samples"] == 7


def test_names_are_imported_when_first_asked_for() -> None:
    for name in datamodules.__all__:
        assert getattr(datamodules, name).__name__ == name
    with pytest.raises(AttributeError, match="Nothing"):
        _ = datamodules.Nothing
    code = "import sys, litflora.datamodules; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0


def test_contents_count_what_is_set_up(photos: Path) -> None:
    data = folder(photos, samples_per_class=2)
    data.setup("fit")
    sizes = [len(data.datasets[name]) for name in ("train", "val")]
    names = ", ".join(data.class_names)
    told = f"{sizes[0]} train, {sizes[1]} val images of {data.num_classes} classes: {names}"
    assert data.contents() == told


def test_workers_are_no_more_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    data = ShapesDataModule(num_workers=8)
    data.setup("test")
    assert data.test_dataloader().num_workers == 3


def test_a_plain_loop_over_samples_ends():
    data = ShapesDataModule(train_samples=3, val_samples=1, test_samples=1, img_size=8)
    data.setup("fit")
    assert [name for _, _, name in data.datasets["train"]] == [f"train/{i:05d}" for i in range(3)]

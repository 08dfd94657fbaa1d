"""A small base on disk, small data, and a quiet Trainer, for the tests of the Lightning side."""

from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import LightningDataModule, Trainer
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from litflora.classification import ClassificationModule

torch.set_num_threads(1)  # tiny tensors: more threads only add noise

NAMES = ["red", "green", "blue"]
SIZE = 32


def save_base(folder: Path, name: str = "test_vit", num_classes: int = 5) -> Path:
    """Saves a timm model of random, but always the same, weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = timm.create_model(name, num_classes=num_classes)
    path = folder / f"{name}.safetensors"
    save_file(net.state_dict(), path)
    return path


def colours(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise, with one channel brighter: its number is the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(NAMES)
    images = torch.rand(n, 3, SIZE, SIZE, generator=generator) / 2
    images[torch.arange(n), labels] += 0.4
    return images, labels


class Named(Dataset[tuple[Tensor, str]]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return self.images[index], f"image {index}.png"


class Colours(LightningDataModule):
    """Shuffled anew in every epoch, from a seed."""

    def __init__(
        self, root: str = ".", n: int = 24, batch_size: int = 8, as_bytes: bool = False
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.num_classes, self.class_names = len(NAMES), NAMES

    def train_dataloader(self) -> DataLoader[Any]:
        data = self._data(0)
        return self._loader(data, DistributedSampler(data, num_replicas=1, rank=0))

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self._data(1))

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self._data(2))

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(Named(colours(self.hparams["n"], 2)[0]))

    def _data(self, seed: int) -> TensorDataset:
        images, labels = colours(self.hparams["n"], seed)
        if self.hparams["as_bytes"]:
            images = (images * 255).to(torch.uint8)
        return TensorDataset(images, labels)

    def _loader(self, data: Dataset[Any], sampler: Any = None) -> DataLoader[Any]:
        return DataLoader(data, batch_size=self.hparams["batch_size"], sampler=sampler)


def module(base: Path | None, **options: Any) -> ClassificationModule:
    """A test_vit on `base` for the colours."""
    weights = None if base is None else str(base)
    settings = {"num_classes": 3, "class_names": NAMES, "img_size": SIZE, **options}
    return ClassificationModule(settings.pop("backbone", "test_vit"), weights=weights, **settings)


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    return Trainer(default_root_dir=folder, **{**quiet, **options})

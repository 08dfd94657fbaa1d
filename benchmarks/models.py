"""The models that are measured: of random weights, each with a classifier for its head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import timm
import torch
from torch import Tensor, nn

CLASSES = 100


@dataclass(frozen=True)
class Model(ABC):
    """A model, and how much it is fed.

    Attributes:
        batch: Inputs at a time.
        size: Pixels of an image's side.
    """

    batch: int
    size: int

    @abstractmethod
    def build(self) -> nn.Module:
        """The network; its ``get_classifier`` tells the head."""

    @abstractmethod
    def example(self) -> Tensor:
        """A batch of noise."""

    @abstractmethod
    def small(self) -> Model:
        """The same kind of model, small enough for gradients in float64."""

    @abstractmethod
    def __str__(self) -> str:
        """How much is measured."""

    def autocast(self, device: str) -> torch.autocast:
        """The context that a forward runs in."""
        return torch.autocast(device, torch.bfloat16, enabled=self.in_bf16(device))

    def in_bf16(self, device: str) -> bool:
        """Whether products are taken in bf16: on a GPU all are, as people train there."""
        return device == "cuda"

    def precision(self, device: str) -> str:
        """The types in words."""
        return "bf16 autocast" if self.in_bf16(device) else "float32"


@dataclass(frozen=True)
class Vision(Model):
    """A network of timm's.

    Attributes:
        name: What timm calls it.
    """

    name: str

    def __str__(self) -> str:
        return f"{self.size} pixels, batch {self.batch}"

    def build(self) -> nn.Module:
        """The network for images of this size."""
        options = {"img_size": self.size} if self.name.startswith("vit") else {}
        return timm.create_model(self.name, num_classes=CLASSES, **options)

    def example(self) -> Tensor:
        """Images of noise."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, 3, self.size, self.size, generator=generator)

    def small(self) -> Vision:
        """The whole network, on small images."""
        return replace(self, batch=2, size=56)


VISION = {  # batch, pixels
    "convnext_tiny": (8, 128),
    "convnext_large": (4, 128),
    "vit_small_patch16_224": (8, 224),
    "vit_large_patch14_clip_224": (2, 224),
    "vit_large_patch14_dinov2": (2, 224),
}
MODELS: dict[str, Model] = {name: Vision(*load, name) for name, load in VISION.items()}

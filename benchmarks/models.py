"""The models that are measured: of random weights, each with a classifier for its head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import timm
import torch
from torch import Tensor, nn

CLASSES = 100


@dataclass(frozen=True)
class Model(ABC):
    """A model, and how much it is fed.

    Attributes:
        batch: Inputs at a time.
        size: Pixels of an image's side, or tokens of a sequence.
        convolutional: Whether it has convolutions to adapt.
        half: Whether its weights are stored in bf16.
    """

    batch: int
    size: int
    convolutional: ClassVar[bool]
    half: ClassVar[bool]

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
        return self.half or device == "cuda"

    def precision(self, device: str) -> str:
        """The types in words."""
        weights = "bf16 weights" if self.half else "float32"
        return f"{weights}, bf16 autocast" if self.in_bf16(device) else weights


@dataclass(frozen=True)
class Vision(Model):
    """A network of timm's.

    Attributes:
        name: What timm calls it.
    """

    name: str
    convolutional: ClassVar[bool] = True  # a ViT too: its patches are embedded by one
    half: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"{self.size} pixels, batch {self.batch}"

    def build(self) -> nn.Module:
        """The network for images of this size."""
        options = {"img_size": self.size} if self.name.startswith("vit") else {}
        net = timm.create_model(self.name, num_classes=CLASSES, **options)
        for name, parameter in net.named_parameters():
            if name.endswith("gamma"):  # layer scale, so small at first that blocks do nothing
                nn.init.ones_(parameter)
        return net

    def example(self) -> Tensor:
        """Images of noise."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, 3, self.size, self.size, generator=generator)

    def small(self) -> Vision:
        """The whole network, on small images."""
        return replace(self, batch=2, size=56)


@dataclass(frozen=True)
class Llama(Model):
    """Decoder layers of LLaMA-7B's shape, fed with embeddings, for these may ask for a gradient.

    The stack is stored in bf16, and runs under bf16 autocast on a CPU too: so do PEFT's users load
    and train theirs. What is added to it, adapters and head, is float32 as each library makes it;
    full tuning trains the bf16 weights themselves.

    Attributes:
        layers: How many of the model's 32.
        hidden: Channels between the layers.
        inner: Channels inside the MLP.
        heads: Heads of the attention.
    """

    layers: int
    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    convolutional: ClassVar[bool] = False
    half: ClassVar[bool] = True

    def __str__(self) -> str:
        count = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        return f"{count}, {self.size} tokens, batch {self.batch}"

    def build(self) -> nn.Module:
        """The stack and its classifier."""
        from transformers import AutoModel, LlamaConfig

        config = LlamaConfig(
            vocab_size=1,  # the input is embedded already, and the table takes time to draw
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
        )
        return Classifier(AutoModel.from_config(config, dtype=torch.bfloat16), self.hidden)

    def example(self) -> Tensor:
        """Embeddings of noise, as small as in a table of new ones."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.batch, self.size, self.hidden, generator=generator)
        return (0.02 * noise).bfloat16()

    def small(self) -> Llama:
        """Two narrow layers and a few tokens."""
        return replace(self, batch=2, size=6, layers=2, hidden=32, inner=48, heads=4)


class Classifier(nn.Module):
    """A stack of decoder layers, and a linear classifier on the last token."""

    def __init__(self, stack: nn.Module, width: int) -> None:
        super().__init__()
        self.stack = stack
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits from embeddings."""
        hidden = self.stack(inputs_embeds=x, use_cache=False).last_hidden_state
        return self.classifier(hidden[:, -1])

    def get_classifier(self) -> nn.Module:
        """The head, by timm's name for it."""
        return self.classifier

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """The layers of the stack, by timm's name for blocks."""
        return {"blocks": r"^stack\.layers\.(\d+)"}


VISION = {  # batch, pixels
    "convnext_tiny": (8, 128),
    "convnext_large": (4, 128),
    "vit_small_patch16_224": (8, 224),
    "vit_large_patch14_clip_224": (2, 224),
    "vit_large_patch14_dinov2": (2, 224),
}
ANYWHERE: dict[str, Model] = {name: Vision(*load, name) for name, load in VISION.items()}
MODELS: dict[str, dict[str, Model]] = {  # by device
    "cpu": {**ANYWHERE, "llama_7b_stack": Llama(batch=1, size=128, layers=1)},
    "cuda": {**ANYWHERE, "llama_7b_stack": Llama(batch=4, size=2048, layers=4)},
}

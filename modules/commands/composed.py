"""The model of a recipe and one batch for it, without any data: what the small commands look at."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..module import TuningModule
    from .train import LitFloraCLI


@dataclass
class Composed:
    """What a recipe makes.

    Attributes:
        model: The tuned model.
        data: The settings of its data.
        trainer: The settings of its trainer.
    """

    model: TuningModule
    data: dict[str, Any]
    trainer: dict[str, Any]


def built(recipe: str, overrides: list[str]) -> LitFloraCLI:
    """The model of a recipe, without its network, and its data, which are not set up."""
    if Path(recipe).is_dir():
        raise ValueError(f"{recipe} is a folder: give a recipe, such as RUN/config.yaml")
    from .train import build

    return build(["--config", recipe, *overrides])


def of(recipe: str, overrides: list[str], weights: str | None = None) -> Composed:
    """The tuned model of a recipe, with what runs it; nothing is fetched."""
    named = ["--model.init_args.weights", weights] if weights else []
    return ready(built(recipe, [*overrides, *named]))


def ready(made: LitFloraCLI) -> Composed:
    """The same with its network; nothing is fetched."""
    model = made.model
    model.base_dtype = None  # what is looked at runs in float32
    if model.weights == "pretrained":  # shapes are enough
        model.weights = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="weights is null")
        model.configure_model()
    return Composed(model, dict(made.datamodule.hparams), dict(made.config.trainer))


def blank(model: TuningModule, data: dict[str, Any]) -> Tensor:
    """A batch of blank images, as large as the data's, normalised."""
    import torch

    named = data.get("crop_size") or data.get("img_size") or getattr(model, "img_size", None)
    size = named or model.net.pretrained_cfg["input_size"][-1]
    sides = (size, size) if isinstance(size, int) else size
    return model.normalize(torch.zeros(data.get("batch_size", 1), 3, *sides))


def pixels(images: Tensor) -> str:
    """Height and width, for people."""
    return f"{images.shape[-2]} x {images.shape[-1]}"

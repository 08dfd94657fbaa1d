"""ClassificationModule: images to one of several classes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import CatMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
)
from torchmetrics.utilities import dim_zero_cat
from torchvision.transforms import v2

from . import backbones
from .adapters import Tuning
from .backbones.embedded import CONVNEXT_SHAPES
from .callbacks import ConfusionMatrix, PredictionWriter
from .classes import ClassesModule, check_length
from .drawing import Drawing, LabelDrawing
from .module import unit_range
from .optim import OneCycle
from .precision import BaseDtype
from .processes import gather_in_order

Batch = tuple[Tensor, Tensor]


class SampleMean(CatMetric):
    """The mean over samples, bit for bit the same however they are spread over processes."""

    def __init__(self) -> None:
        super().__init__(nan_strategy="disable", dist_sync_fn=gather_in_order)

    def compute(self) -> Tensor:
        """The mean of all values so far."""
        return dim_zero_cat(self.value).mean()


class ClassificationModule(ClassesModule):
    """Tunes a timm backbone to tell classes of images apart.

    It logs ``train/loss`` and, for validation and test, ``loss``, top-1 accuracy ``acc``, ``top5``,
    the mean F1 of the classes ``f1``, and the expected calibration error ``ece``.
    """

    task: ClassVar[str] = "classification"
    monitor: ClassVar[str] = "val/acc"
    drawing: ClassVar[type[Drawing]] = LabelDrawing
    class_weights: Tensor | None

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        class_names: list[str] | None = None,
        weights: str | None = "pretrained",
        tuning: Tuning | None = None,
        img_size: int | None = None,
        adapter: str | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = OneCycle,
        lr: float | None = None,
        head_lr: float | None = None,
        layer_decay: float | None = None,
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        drop_path: float = 0.0,
        activation_checkpointing: str = "none",
        base_dtype: BaseDtype | None = None,
    ) -> None:
        """Keeps the settings; the Trainer calls ``configure_model`` to build the network.

        Args:
            backbone: A timm model name, or ``convnext_shapes``.
            num_classes: Number of classes; the command line takes it from the data.
            class_names: Names of the classes, in order; the command line takes them from the data.
            weights: ``pretrained``, a local file, ``embedded`` (convnext_shapes), or None.
            tuning: What is trained; None is ``FLoRA()``. If it names no targets, the layers that
                suit the backbone are adapted.
            img_size: Side of the images in pixels; None is the backbone's own.
            adapter: Folder of a saved adapter to start from, in place of ``tuning``.
            optimizer: Makes the optimizer from parameter groups; None is AdamW at the
                tuning's own rate, see `litflora.optim.LEARNING_RATES`.
            lr_scheduler: Makes the schedule from the optimizer; None keeps the rate constant.
            lr: Learning rate in place of the optimizer's own.
            head_lr: Learning rate of the head; None is the optimizer's.
            layer_decay: Ratio of the learning rates of neighbouring layers; None is 1.
            label_smoothing: Share of each label that is spread over all classes.
            class_weights: Weight of each class in the loss.
            mixup: Alpha of mixup; 0 is none. With cutmix, each batch gets one or the other.
            cutmix: Alpha of cutmix; 0 is none.
            drop_path: Probability that the last block of the backbone is left out in training;
                that of earlier blocks falls to 0 (stochastic depth).
            activation_checkpointing: ``none``, ``blocks`` (each block of the backbone keeps its
                input alone, and runs again in backward) or ``every-k``: each k-th block.
            base_dtype: What frozen linear layers and convolutions are held in, bfloat16; None is
                float32. Deltas, norms and heads stay float32. It needs precision bf16-mixed.
        """
        super().__init__(
            num_classes=num_classes,
            class_names=class_names,
            weights=weights,
            tuning=tuning,
            adapter=adapter,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr=lr,
            head_lr=head_lr,
            layer_decay=layer_decay,
            activation_checkpointing=activation_checkpointing,
            base_dtype=base_dtype,
        )
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), not {label_smoothing}")
        if class_weights is not None and not all(0 <= w < float("inf") for w in class_weights):
            raise ValueError(f"class_weights must be finite and 0 or more, not {class_weights}")
        check_length("class_weights", class_weights, num_classes)
        if min(mixup, cutmix) < 0:
            raise ValueError(f"mixup and cutmix must be 0 or more, not {mixup} and {cutmix}")
        self.backbone = backbone
        self.img_size = img_size
        self.drop_path = drop_path
        self.label_smoothing = label_smoothing
        weight = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weight, persistent=False)
        self.mix = _mixing(mixup, cutmix, num_classes)
        self.val_loss, self.test_loss = SampleMean(), SampleMean()
        metrics = _metrics(num_classes)
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")

    def metadata(self, datamodule: Any = None) -> dict[str, Any]:
        """Adds the size of the images."""
        return {**super().metadata(datamodule), "img_size": self.img_size}

    def configure_callbacks(self) -> list[Callback]:
        """The confusion matrix of a test, and the table of a prediction."""
        return [ConfusionMatrix(), PredictionWriter()]

    def build(self) -> nn.Module:
        """Makes the timm model."""
        options = self.weights, self.num_classes, self.img_size, self.drop_path
        return backbones.create(self.backbone, *options)

    def plain_code(self) -> tuple[str, str]:
        """A call of plain timm."""
        options: dict[str, Any] = {"num_classes": self.num_classes}
        if self.img_size is not None and hasattr(self.net, "set_input_size"):
            options["img_size"] = self.img_size  # the position embeddings have this size
        maker = f"timm.create_model({self.backbone!r}, "
        if self.backbone == "convnext_shapes":  # timm knows the class, not this size of it
            maker, options = "timm.models.ConvNeXt(", {**CONVNEXT_SHAPES, **options}
        return "timm", maker + ", ".join(f"{key}={v!r}" for key, v in options.items()) + ")"

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images that are uint8 or floats in [0, 1], not normalised."""
        assert self.net is not None, "call configure_model() first"
        return self.net(self.normalize(images))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch, mixed if asked."""
        images, labels = batch
        if self.mix is not None:
            images, labels = self.mix(unit_range(images), labels)
        loss = self._loss(self(images), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates the validation metrics."""
        self._evaluate(batch, "val", self.val_loss, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Updates the test metrics; returns ``probs`` and ``labels`` for callbacks."""
        return self._evaluate(batch, "test", self.test_loss, self.test_metrics)

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> dict[str, Any]:
        """Returns the ``paths`` of the images and the ``probs`` of the classes."""
        images, paths = batch
        return {"paths": list(paths), "probs": self(images).float().softmax(-1)}

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        weight, smoothing = self.class_weights, self.label_smoothing
        return F.cross_entropy(logits.float(), labels, weight=weight, label_smoothing=smoothing)

    def _evaluate(
        self, batch: Batch, stage: str, loss: Metric, metrics: MetricCollection
    ) -> dict[str, Tensor]:
        images, labels = batch
        logits = self(images).float()
        loss.update(F.cross_entropy(logits, labels, reduction="none"))
        self.log(f"{stage}/loss", loss, batch_size=len(images))
        probs = logits.softmax(-1)
        metrics.update(probs, labels)
        for name, metric in metrics.items():
            self.log(name, metric, prog_bar=name.endswith("/acc"), batch_size=len(images))
        return {"probs": probs, "labels": labels}


def _metrics(num_classes: int) -> MetricCollection:
    return MetricCollection(
        {
            "acc": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            "f1": MulticlassF1Score(num_classes, average="macro"),
            "ece": MulticlassCalibrationError(num_classes, dist_sync_fn=gather_in_order),
        },
        # Groups are guessed from the first batch: if it is all right, top5 would follow acc.
        compute_groups=False,
    )


def _mixing(mixup: float, cutmix: float, num_classes: int) -> nn.Module | None:
    kinds = [
        kind(alpha=alpha, num_classes=num_classes)
        for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        if alpha > 0
    ]
    if not kinds:
        return None
    return v2.RandomChoice(kinds) if len(kinds) > 1 else kinds[0]

"""DetectionModule: images to boxes, classes and masks of the objects in them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from .adapters import Tuning
from .average_precision import AveragePrecision
from .backbones import create_pyramid
from .callbacks import ClassTable, DetectionWriter, Gallery
from .dense import DenseModule
from .drawing import BoxDrawing, Drawing
from .heads.detection import DetectionNet, Target
from .heads.detectors import check_detector, finest_stride
from .optim import OneCycle
from .precision import BaseDtype

TrainBatch = tuple[Tensor, list[Target]]
# Images of an evaluation keep their own sizes.
Batch = tuple[list[Tensor], list[Target]]


class DetectionModule(DenseModule):
    """Tunes a timm backbone, and trains one of torchvision's detectors on it.

    It logs ``train/loss``, the detector's own losses, and for validation and test COCO's average
    precisions of boxes, ``box_map`` and ``box_map50`` among them, and of masks: ``mask_map``, ...
    """

    task: ClassVar[str] = "detection"
    monitor: ClassVar[str] = "val/box_map50"
    least_classes: ClassVar[int] = 1
    drawing: ClassVar[type[Drawing]] = BoxDrawing

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        class_names: list[str] | None = None,
        weights: str | None = "pretrained",
        detector: str = "faster_rcnn",
        head_width: int = 256,
        anchor_scale: float | None = None,
        detector_options: dict[str, int | float] | None = None,
        tuning: Tuning | None = None,
        neck_tuning: Tuning | None = None,
        head_tuning: Tuning | None = None,
        img_size: int | list[int] | None = None,
        adapter: str | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = OneCycle,
        lr: float | None = None,
        head_lr: float | None = None,
        layer_decay: float | None = None,
        drop_path: float = 0.0,
        activation_checkpointing: str = "none",
        base_dtype: BaseDtype | None = None,
    ) -> None:
        """Keeps the settings; the Trainer calls ``configure_model`` to build the network.

        Args:
            backbone: A timm model name, or ``convnext_shapes``.
            num_classes: Number of classes, without background; the command line takes it from the
                data.
            class_names: Names of the classes, in order; the command line takes them from the data.
            weights: ``pretrained``, a local file, ``embedded`` (convnext_shapes), or None. A file
                that `litflora merge` wrote has weights of the feature pyramid and the head, too.
            detector: faster_rcnn, mask_rcnn, retinanet or fcos.
            head_width: Channels of the feature pyramid and of the heads on it.
            anchor_scale: Side of the anchors in strides of their map; None is as published: 8, for
                retinanet 4, for fcos 1. Smaller ones suit small images.
            detector_options: Other numbers that torchvision's class takes, such as
                ``box_score_thresh``.
            tuning: What is trained of the backbone; None is ``FLoRA()``. If it names no targets,
                the layers that suit the backbone are adapted.
            neck_tuning: What is trained of the feature pyramid; None trains it whole.
            head_tuning: What is trained of the head; None trains it whole. Any but `Full` needs
                weights of the head: those of a merged file.
            img_size: Side, or height and width, of the training images in pixels, which others are
                resized to fit; None is the backbone's own.
            adapter: Folder of a saved adapter to start from, in place of all tunings.
            optimizer: Makes the optimizer from parameter groups; None is AdamW at the
                tuning's own rate, see `litflora.optim.LEARNING_RATES`.
            lr_scheduler: Makes the schedule from the optimizer; None keeps the rate constant.
            lr: Learning rate in place of the optimizer's own.
            head_lr: Learning rate of all but the backbone; None is the optimizer's.
            layer_decay: Ratio of the learning rates of neighbouring layers; None is 1.
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
            neck_tuning=neck_tuning,
            head_tuning=head_tuning,
            adapter=adapter,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr=lr,
            head_lr=head_lr,
            layer_decay=layer_decay,
            activation_checkpointing=activation_checkpointing,
            base_dtype=base_dtype,
        )
        check_detector(detector, detector_options or {})
        if anchor_scale is not None and not anchor_scale > 0:
            raise ValueError(f"anchor_scale must be above 0, not {anchor_scale}")
        if head_width < 1:
            raise ValueError(f"head_width must be at least 1, not {head_width}")
        self.backbone = backbone
        self.detector = detector
        self.head_width = head_width
        self.anchor_scale = anchor_scale
        self.detector_options = detector_options
        self.img_size = img_size
        self.drop_path = drop_path
        self.masks = detector == "mask_rcnn"
        self.val_metrics = AveragePrecision(self.masks)
        self.test_metrics = AveragePrecision(self.masks, per_class=True)

    def setup(self, stage: str) -> None:
        """Checks, before the network is built, that data and precision suit it."""
        super().setup(stage)
        lacking = getattr(self.trainer.datamodule, "masks", True) is False
        if self.masks and lacking and stage != "predict":
            raise ValueError(
                "mask_rcnn learns masks, and the data give none: set data.init_args.masks true, "
                "or take faster_rcnn"
            )
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"precision {self.trainer.precision} is too coarse for boxes: use bf16-mixed"
            )

    def on_fit_start(self) -> None:
        """Checks that images are judged at the size that they are trained at."""
        assert self.net is not None
        size = self.net.detector.transform.size
        crop = getattr(self.trainer.datamodule, "crop_size", size)
        if tuple(crop) != size:
            raise ValueError(
                f"training images have {' x '.join(map(str, crop))} pixels (data.crop_size), and "
                f"others are made to fit {' x '.join(map(str, size))} (model.img_size): give both "
                "the same"
            )

    def configure_callbacks(self) -> list[Callback]:
        """The gallery of a fit, the classes' table of a test, and the files of a prediction."""
        return [Gallery(), ClassTable(), DetectionWriter()]

    def assemble(self, weights: str | None) -> nn.Module:
        """Makes the backbone's pyramid and the detector on it."""
        width, finest = self.head_width, finest_stride(self.detector)
        options = {"width": width, "finest": finest, "drop_path": self.drop_path}
        pyramid = create_pyramid(self.backbone, weights, self.img_size, **options)
        own = pyramid.pretrained_cfg["input_size"][1:]
        sides = (self.img_size,) * 2 if isinstance(self.img_size, int) else self.img_size or own
        if min(sides) < pyramid.divisor:
            raise ValueError(f"img_size must be at least {pyramid.divisor}, not {min(sides)}")
        return DetectionNet(
            self.detector,
            pyramid,
            self.num_classes,
            width,
            (sides[0], sides[1]),
            self.anchor_scale,
            self.detector_options,
        )

    def plain_code(self) -> tuple[str, str]:
        """The net is litflora's own: a detector on a pyramid."""
        names = ("detector", "head_width", "anchor_scale", "detector_options", "img_size")
        options = {**{name: getattr(self, name) for name in names}, "weights": None}
        told = ", ".join(f"{key}={value!r}" for key, value in options.items())
        made = f"DetectionModule({self.backbone!r}, {self.num_classes}, {told}).build()"
        return "litflora", f"litflora.{made}"

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        """Losses in training, else what is found; see `litflora.heads.detection.DetectionNet`.

        Args:
            images: Images [3, H, W], uint8 or floats in [0, 1], not normalised, of any size.
            targets: What is in them, in training.
        """
        assert self.net is not None, "call configure_model() first"
        return self.net([self.normalize(image[None])[0] for image in images], targets)

    def example(self, images: Tensor) -> tuple[Any, ...]:
        """The images, with an object in each that fills it."""
        height, width = images.shape[-2:]
        target = {
            "boxes": images.new_tensor([[0, 0, width, height]], dtype=torch.float),
            "labels": images.new_zeros(1, dtype=torch.int64),
            "masks": images.new_ones(1, height, width, dtype=torch.uint8),
        }
        return list(images), [target] * len(images)

    @torch.no_grad()
    def detect(self, image: Tensor) -> Target:
        """What is found in one image [3, H, W] of any size; call ``eval()`` before.

        Returns:
            ``boxes`` [n, 4] (x0, y0, x1, y1 in pixels), ``labels`` [n] from 0, ``scores`` [n],
            highest first, and for Mask R-CNN ``masks`` [n, H, W], bool.
        """
        return self([image])[0]

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """The sum of the detector's losses on a batch."""
        images, targets = batch
        losses = self(list(images), targets)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        parts = {f"train/{name}": value.detach() for name, value in losses.items()}
        self.log_dict(parts, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates the validation metrics."""
        images, targets = batch
        self.val_metrics.update(self(images), targets)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates the test metrics."""
        images, targets = batch
        self.test_metrics.update(self(images), targets)

    def on_validation_epoch_end(self) -> None:
        """Logs the precisions of the validation set."""
        self._log_precisions("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Logs the precisions of the test set."""
        self._log_precisions("test", self.test_metrics)

    def class_scores(self) -> tuple[str, list[float]]:
        """The average precision of each class's boxes in the test so far; nan where it has none."""
        found = self.test_metrics.compute()
        scores = torch.full((self.num_classes,), float("nan"))
        scores[found["classes"].view(-1).long()] = found["box_map_per_class"].view(-1)
        return "AP", scores.where(scores >= 0, float("nan")).tolist()

    def predict_step(self, batch: tuple[list[Tensor], list[str]], batch_idx: int) -> dict[str, Any]:
        """Returns the ``names`` of the images and what is ``found`` in each."""
        images, names = batch
        return {"names": list(names), "found": self(images)}

    def _log_precisions(self, stage: str, metric: AveragePrecision) -> None:
        # All processes have the same, which the greatest of them is: a mean would be rounded.
        options = {"sync_dist": True, "reduce_fx": "max"}
        for name, value in metric.compute().items():
            if name != "classes" and not name.endswith("per_class"):
                shown = name.endswith("map50")
                self.log(f"{stage}/{name}", float(value), prog_bar=shown, **options)
        metric.reset()

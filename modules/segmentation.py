"""SegmentationModule: images to a class for each pixel."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection

from .adapters import Tuning
from .backbones import create_pyramid
from .callbacks import ClassTable, Gallery, MaskWriter
from .classes import check_length
from .dense import DenseModule
from .drawing import Drawing, MaskDrawing
from .heads.segmentation import SegmentationNet, create_head
from .losses import SegmentationLoss
from .metrics import segmentation_metrics
from .optim import OneCycle
from .precision import BaseDtype
from .windows import Inference, Whole

TrainBatch = tuple[Tensor, Tensor]
# Images of an evaluation keep their own sizes, and so do their masks.
Batch = tuple[list[Tensor], list[Tensor]]


class SegmentationModule(DenseModule):
    """Tunes a timm backbone, and trains a decoder on it, to give each pixel a class.

    It logs ``train/loss`` and, for validation and test, the mean intersection over union of the
    whole set ``miou``, the pixel accuracy ``acc`` and the boundary F-score ``boundary_f``, at the
    images' own resolution.
    """

    task: ClassVar[str] = "segmentation"
    monitor: ClassVar[str] = "val/miou"
    drawing: ClassVar[type[Drawing]] = MaskDrawing

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        class_names: list[str] | None = None,
        weights: str | None = "pretrained",
        head: str = "segformer",
        head_width: int = 256,
        tuning: Tuning | None = None,
        neck_tuning: Tuning | None = None,
        head_tuning: Tuning | None = None,
        img_size: int | list[int] | None = None,
        blocks: list[int] | None = None,
        losses: dict[str, float] | None = None,
        class_weights: list[float] | None = None,
        inference: Inference | None = None,
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
            num_classes: Number of classes; the command line takes it from the data.
            class_names: Names of the classes, in order; the command line takes them from the data.
            weights: ``pretrained``, a local file, ``embedded`` (convnext_shapes), or None. A file
                that `litflora merge` has written is of backbone, neck and head.
            head: The decoder: linear, unet, fpn, upernet, segformer, dpt or deeplabv3plus.
            head_width: Channels that the decoder works in, and a plain ViT's pyramid.
            tuning: What is trained of the backbone; None is ``FLoRA()``. If it names no targets,
                the layers that suit the backbone are adapted.
            neck_tuning: What is trained of a plain ViT's feature pyramid; None trains it whole.
            head_tuning: What is trained of the head; None trains it whole. Any but `Full` needs
                weights of the head: those of a merged file.
            img_size: Side, or height and width, of the training images in pixels; None is the
                backbone's own.
            blocks: Blocks of a ViT whose maps the head gets, in place of a feature pyramid.
            losses: Weights of the losses by name: cross_entropy, dice, focal, lovasz. None is
                cross_entropy alone.
            class_weights: Weight of each class in the cross-entropy.
            inference: How images are evaluated; None is each as a whole.
            adapter: Folder of a saved adapter to start from, in place of all tunings.
            optimizer: Makes the optimizer from parameter groups; None is AdamW at the
                tuning's own rate, see `litflora.optim.LEARNING_RATES`.
            lr_scheduler: Makes the schedule from the optimizer; None keeps the rate constant.
            lr: Learning rate in place of the optimizer's own.
            head_lr: Learning rate of neck and head; None is the optimizer's.
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
        check_length("class_weights", class_weights, num_classes)
        self.backbone = backbone
        self.head = head
        self.head_width = head_width
        self.img_size = img_size
        self.blocks = blocks
        self.drop_path = drop_path
        self.loss = SegmentationLoss(losses or {"cross_entropy": 1.0}, class_weights)
        self.inference = Whole() if inference is None else inference
        metrics = segmentation_metrics(num_classes)
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")

    def configure_callbacks(self) -> list[Callback]:
        """The gallery of a fit, the classes' table of a test, and the masks of a prediction."""
        return [Gallery(), ClassTable(), MaskWriter()]

    def assemble(self, weights: str | None) -> nn.Module:
        """Makes the backbone's pyramid and the head on it."""
        width, options = self.head_width, (self.img_size, self.blocks, self.head_width)
        pyramid = create_pyramid(self.backbone, weights, *options, drop_path=self.drop_path)
        maps = pyramid.channels, pyramid.strides
        head = create_head(self.head, *maps, self.num_classes, width)
        return SegmentationNet(pyramid, head)

    def plain_code(self) -> tuple[str, str]:
        """The net is litflora's own: a pyramid and a head."""
        options = {"img_size": self.img_size, "blocks": self.blocks, "weights": None}
        options |= {"head": self.head, "head_width": self.head_width}
        told = ", ".join(f"{key}={value!r}" for key, value in options.items())
        made = f"SegmentationModule({self.backbone!r}, {self.num_classes}, {told}).build()"
        return "litflora", f"litflora.{made}"

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, C, H, W]`` of images, uint8 or floats in [0, 1], not normalised."""
        assert self.net is not None, "call configure_model() first"
        return self.net(self.normalize(images))

    def segment(self, image: Tensor) -> Tensor:
        """Class ids ``[H, W]`` of one image ``[3, H, W]`` of any size; call ``eval()`` before."""
        assert self.net is not None, "call configure_model() first"
        # Normalised first: an inference pads with zeros, the mean colour that training pads with.
        return self.inference(self.net, self.normalize(image[None])[0])

    def class_scores(self) -> tuple[str, list[float]]:
        """The intersection over union of each class in the test so far."""
        return "IoU", self.test_metrics["iou"].compute().tolist()

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """The loss of a batch of crops."""
        images, masks = batch
        try:
            logits = self(images)
        except ValueError as reason:
            if "more than 1 value per channel" not in str(reason):
                raise
            raise ValueError(
                f"{self.head} has batch norms, which need more than a batch of {len(images)} image "
                "of this size: set data.init_args.batch_size to 2 or more, or take another head"
            ) from reason
        loss = self.loss(logits, masks)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates the validation metrics."""
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates the test metrics."""
        self._evaluate(batch, self.test_metrics)

    def predict_step(self, batch: tuple[list[Tensor], list[str]], batch_idx: int) -> dict[str, Any]:
        """Returns the ``names`` of the images and their class ``ids``."""
        images, names = batch
        return {"names": list(names), "ids": [self.segment(image) for image in images]}

    def _evaluate(self, batch: Batch, metrics: MetricCollection) -> None:
        images, masks = batch
        for image, mask in zip(images, masks, strict=True):
            metrics.update(self.segment(image), mask)
        for name, metric in metrics.items():
            if not name.endswith("/iou"):  # one for each class: `ClassTable` shows these
                shown = name.endswith("/miou")
                self.log(name, metric, prog_bar=shown, batch_size=len(images))

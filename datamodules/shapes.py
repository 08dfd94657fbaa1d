"""Drawn shapes: data for every task with no download, in two domains."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .base import SPLITS, ClassificationDataModule, Samples, check_at_least
from .dense import DenseSamples
from .detection import DetectionDataModule, Objects, Target
from .masks import Legend
from .scenes import DOMAINS, KINDS, Scene, draw_scene, masks, render
from .segmentation import SegmentationDataModule
from .transforms import boxes_round, to_tensors


class ShapesDataModule(ClassificationDataModule):
    """Scenes of coloured shapes; the class is the kind of the largest one.

    Sample `index` of a split follows from the seed alone. Both domains draw the same scenes:
    "source" fills shapes on a plain ground, "shifted" only outlines them, on a darker pattern.

    Args:
        domain: "source" or "shifted".
        train_samples: Training images.
        val_samples: Validation images.
        test_samples: Test images.
        img_size: Side of the images in pixels.
        batch_size: Samples in a batch of one process.
        num_workers: Processes that load; the images are drawn once and kept, so 0 does well.
        seed: Decides the scenes, their order and the subset.
        samples_per_class: Train on that many samples of each class only.
    """

    def __init__(
        self,
        domain: str = "shifted",
        train_samples: int = 2000,
        val_samples: int = 500,
        test_samples: int = 1000,
        img_size: int = 64,
        batch_size: int = 50,
        num_workers: int = 0,
        seed: int = 0,
        samples_per_class: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, samples_per_class)
        self.counts = counts_of(domain, img_size, train_samples, val_samples, test_samples)
        self.domain = domain
        self.img_size = img_size
        self.class_names = list(KINDS)

    def split(self, name: str) -> Samples:
        """Draw all images of a split; prediction takes those of the test split."""
        scenes, names = draw(self.seed, name, self.counts)
        return Samples(
            images=pictures(scenes, self.img_size, self.domain),
            labels=[KINDS.index(scene.main.kind) for scene in scenes],
            names=names,
        )


class ShapesSegmentationDataModule(SegmentationDataModule):
    """Scenes of shapes alike in size, with masks: the kind of each shape, and the background.

    Args:
        domain: "source" or "shifted".
        train_samples: Training images.
        val_samples: Validation images.
        test_samples: Test images.
        img_size: Side of the images in pixels.
        batch_size: Samples in a training batch of one process.
        eval_batch_size: Samples in any other batch.
        num_workers: Processes that load; the images are drawn once and kept, so 0 does well.
        seed: Decides the scenes and their order.
    """

    legend = Legend(("background", *KINDS))

    def __init__(
        self,
        domain: str = "shifted",
        train_samples: int = 2000,
        val_samples: int = 500,
        test_samples: int = 1000,
        img_size: int = 96,
        batch_size: int = 50,
        eval_batch_size: int = 50,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        self.counts = counts_of(domain, img_size, train_samples, val_samples, test_samples)
        self.domain = domain
        self.crop_size = (img_size, img_size)

    def split(self, name: str) -> DenseSamples:
        """Draw all images and masks of a split; prediction takes the images of the test split."""
        return _dense(self, name, _kinds, to_tensors())


class ShapesDetectionDataModule(DetectionDataModule):
    """Scenes of shapes alike in size: the kind, the box and the visible mask of each shape.

    Args:
        domain: "source" or "shifted".
        train_samples: Training images.
        val_samples: Validation images.
        test_samples: Test images.
        img_size: Side of the images in pixels.
        batch_size: Samples in a training batch of one process.
        eval_batch_size: Samples in any other batch.
        num_workers: Processes that load; the images are drawn once and kept, so 0 does well.
        seed: Decides the scenes and their order.
    """

    def __init__(
        self,
        domain: str = "shifted",
        train_samples: int = 2000,
        val_samples: int = 500,
        test_samples: int = 1000,
        img_size: int = 96,
        batch_size: int = 20,
        eval_batch_size: int = 20,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        self.counts = counts_of(domain, img_size, train_samples, val_samples, test_samples)
        self.domain = domain
        self.crop_size = (img_size, img_size)
        self.class_names = list(KINDS)

    def split(self, name: str) -> DenseSamples:
        """Draw all images and objects of a split; prediction takes the images of the test split."""
        target = partial(_objects, train=name == "train")
        return _dense(self, name, target, v2.ToPureTensor())


def counts_of(domain: str, img_size: int, *samples: int) -> dict[str, int]:
    """The samples of each split, once all is checked."""
    if domain not in DOMAINS:
        raise ValueError(f"domain {domain!r} is none of {', '.join(DOMAINS)}")
    check_at_least("img_size", img_size, 8)
    if min(samples) < 1:
        raise ValueError("train_samples, val_samples and test_samples must be at least 1")
    return dict(zip(SPLITS, samples, strict=True))


def draw(
    seed: int, name: str, counts: dict[str, int], layout: str = "main"
) -> tuple[list[Scene], list[str]]:
    """The scenes of a split and their names."""
    name = "test" if name == "predict" else name
    split = SPLITS.index(name)
    scenes = [draw_scene(seed, split, index, layout) for index in range(counts[name])]
    return scenes, [f"{name}/{index:05d}" for index in range(len(scenes))]


def pictures(scenes: list[Scene], size: int, domain: str) -> Tensor:
    """The pictures of scenes: uint8 [scenes, 3, size, size]."""
    pictures = np.stack([render(scene, size, domain) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def _dense(
    data: ShapesSegmentationDataModule | ShapesDetectionDataModule,
    name: str,
    target: Callable[[Scene, int], Any],
    transform: Callable[[Any], Any],
) -> DenseSamples:
    """The images of a split, each with what `target` makes of scene and size."""
    scenes, names = draw(data.seed, name, data.counts, "even")
    size = data.crop_size[0]
    images = map(tv_tensors.Image, pictures(scenes, size, data.domain))
    targets = (None if name == "predict" else target(scene, size) for scene in scenes)
    return DenseSamples(list(zip(images, targets, strict=True)), names, transform)


def _kinds(scene: Scene, size: int) -> tv_tensors.Mask:
    """The class of each pixel: [size, size]."""
    kinds = torch.zeros(size, size, dtype=torch.uint8)
    for thing, visible in zip(scene.objects, masks(scene, size), strict=True):
        kinds[torch.from_numpy(visible)] = 1 + KINDS.index(thing.kind)
    return tv_tensors.Mask(kinds)


def _objects(scene: Scene, size: int, train: bool) -> Target:
    """The shapes of which something is to be seen."""
    visible = masks(scene, size)
    seen = np.flatnonzero(visible.any((1, 2)))
    shown = visible[seen].astype(np.uint8)
    objects = Objects(
        boxes_round(torch.from_numpy(shown)).numpy(),
        np.array([KINDS.index(scene.objects[index].kind) for index in seen], np.int64),
        np.zeros(len(seen), np.int64),
        shown.sum((1, 2), dtype=np.float32),
        shown,
    )
    return objects.target(size, size, train)

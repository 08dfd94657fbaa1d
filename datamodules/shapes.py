"""Drawn shapes: data for every task with no download, in two domains."""

import numpy as np
import torch

from .base import SPLITS, ClassificationDataModule, Samples, check_at_least
from .scenes import DOMAINS, KINDS, draw_scene, render


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
        if domain not in DOMAINS:
            raise ValueError(f"domain {domain!r} is none of {', '.join(DOMAINS)}")
        check_at_least("img_size", img_size, 8)
        if min(train_samples, val_samples, test_samples) < 1:
            raise ValueError("train_samples, val_samples and test_samples must be at least 1")
        self.domain = domain
        self.img_size = img_size
        self.counts = dict(zip(SPLITS, (train_samples, val_samples, test_samples), strict=True))
        self.class_names = list(KINDS)

    def split(self, name: str) -> Samples:
        """Draw all images of a split; prediction takes those of the test split."""
        name = "test" if name == "predict" else name
        scenes = [
            draw_scene(self.seed, SPLITS.index(name), index) for index in range(self.counts[name])
        ]
        pictures = np.stack([render(scene, self.img_size, self.domain) for scene in scenes])
        return Samples(
            images=torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(),
            labels=[KINDS.index(scene.main.kind) for scene in scenes],
            names=[f"{name}/{index:05d}" for index in range(len(scenes))],
        )

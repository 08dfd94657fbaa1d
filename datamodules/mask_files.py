"""Segmentation from files: splits, transforms, and a check of all files."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from torch.utils.data import DistributedSampler
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from .base import check_at_least
from .dense import DenseSamples, read_photo
from .images import check_splitting, images_to_predict
from .masks import Legend, Pair, read_mask, read_pair
from .samplers import RepeatFactorSampler, repeat_factors
from .segmentation import SegmentationDataModule
from .splits import hold_out
from .transforms import middle, random_crop, to_tensors


@dataclass
class MaskFiles:
    """Files of images and masks, read when asked for."""

    paths: Sequence[Pair]
    legend: Legend

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask | None]:
        image_path, mask_path = self.paths[index]
        if mask_path is None:
            return tv_tensors.Image(pil_to_tensor(read_photo(image_path))), None
        image, mask = read_pair(image_path, mask_path, self.legend)
        return tv_tensors.Image(pil_to_tensor(image)), tv_tensors.Mask(mask)


class MaskFilesDataModule(SegmentationDataModule):
    """Image files with mask files; a subclass gives the legend and finds the splits.

    A missing validation split is held out from the training images by the seed; validation images
    stand in for a missing test split. Images come upright, as a viewer shows them.

    Args:
        root: The data set's own folder.
        crop_size: Height and width of training images in pixels, or one number for both.
        batch_size: Samples in a training batch of one process.
        eval_batch_size: Samples in any other batch; those images keep their own sizes.
        num_workers: Processes that load; they change the speed and never the batches.
        seed: Decides a held out split, order and augmentation.
        val_fraction: Share of the training images held out if there is no validation split.
        augment: Scale, crop, mirror and recolour training images at random. Without it their
            middle is cut out.
        scale_range: Scales that augmentation draws from; at 1 an image has its own size, which it
            has in evaluation, too.
        photometric: Let augmentation change brightness, contrast, saturation and hue.
        class_balanced: Show training images of rare classes more often, which makes the epoch
            longer. Reads all training masks once.
        balance_threshold: Classes in a smaller share f of the training images are rare; theirs are
            shown sqrt(balance_threshold / f) times.
        check: Read all images and masks of the coming stage once before it begins, and name those
            with mistakes.
        predict_root: Folder of images to predict, with any folders inside; else the test split.
            With it, `root` may be missing.
    """

    def __init__(
        self,
        root: str,
        crop_size: int | tuple[int, int] = 512,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        augment: bool = True,
        scale_range: tuple[float, float] = (0.5, 2.0),
        photometric: bool = True,
        class_balanced: bool = False,
        balance_threshold: float = 0.1,
        check: bool = False,
        predict_root: str | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        height, width = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        check_at_least("crop_size", min(height, width), 1)
        check_splitting(val_fraction, predict_root)
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"scale_range={list(scale_range)} must be two scales, least first")
        if not 0 < balance_threshold <= 1:
            raise ValueError(f"balance_threshold={balance_threshold} is a share: it lies in (0, 1]")
        if predict_root is None and not Path(root).is_dir():
            raise FileNotFoundError(f"data root {root} is no folder (set data.init_args.root)")
        self.root = Path(root)
        self.crop_size = (height, width)
        self.val_fraction = val_fraction
        self.augment = augment
        self.scale_range = scale_range
        self.photometric = photometric
        self.class_balanced = class_balanced
        self.balance_threshold = balance_threshold
        self.check = check
        self.predict_root = predict_root
        self._splits: dict[str, list[Pair]] = {}

    @abstractmethod
    def official_splits(self) -> dict[str, list[Pair]]:
        """The splits that the data set itself defines, "train" at least."""

    def prepare_data(self) -> None:
        """Also read every file of the coming stage once, if `check` asks for it."""
        super().prepare_data()
        if self.check and self.datasets:
            paths = (pair for samples in self.datasets.values() for pair in samples.pairs.paths)
            check_pairs(list(dict.fromkeys(paths)), self.legend)

    def split(self, name: str) -> DenseSamples:
        """The samples of a split with its transform; "predict" falls back to "test"."""
        paths = self._paths(name)
        return DenseSamples(
            MaskFiles(paths, self.legend),
            [str(image) for image, _ in paths],
            self._train_transform() if name == "train" else to_tensors(),
            self.seed,
        )

    def _paths(self, name: str) -> list[Pair]:
        if name == "predict" and self.predict_root is not None:
            return [(path, None) for path in images_to_predict(self.predict_root)]
        self._splits = self._splits or self._complete(self.official_splits())
        if name == "predict":
            return [(image, None) for image, _ in self._splits["test"]]
        return self._splits[name]

    def _complete(self, splits: dict[str, list[Pair]]) -> dict[str, list[Pair]]:
        if "val" not in splits:
            train = splits["train"]
            kept, held = hold_out([0] * len(train), self.val_fraction, self.seed)
            splits |= {"train": [train[i] for i in kept], "val": [train[i] for i in held]}
        return {"test": splits["val"], **splits}

    def _train_transform(self) -> Callable[[Any], Any]:
        if not self.augment:
            return v2.Compose([middle(self.crop_size), to_tensors()])
        crop = random_crop(self.crop_size, self.scale_range, self.photometric)
        return v2.Compose([crop, to_tensors()])

    def _sampler(self, options: dict[str, Any]) -> DistributedSampler[int]:
        if not self.class_balanced:
            return super()._sampler(options)
        return RepeatFactorSampler(self._repeats, **options)

    @cached_property
    def _repeats(self) -> NDArray[np.floating]:
        present = classes_present(self.datasets["train"].pairs.paths, self.legend)
        return repeat_factors(present, self.balance_threshold)


def check_pairs(paths: Sequence[Pair], legend: Legend) -> None:
    """Read all files once and raise one error that names those with mistakes."""
    files = MaskFiles(paths, legend)

    def mistake(index: int) -> str | None:
        try:
            files[index]
        except ValueError as reason:
            return str(reason)
        return None

    found = [said for said in _each(mistake, len(paths), "Checking images and masks") if said]
    if found:
        more = [f"and {len(found) - 10} more"] if len(found) > 10 else []
        raise ValueError(
            "\n".join([f"{len(found)} of {len(paths)} samples have mistakes:", *found[:10], *more])
        )


def classes_present(paths: Sequence[Pair], legend: Legend) -> NDArray[np.bool_]:
    """Which classes are in which mask: [masks, classes]."""

    def present(index: int) -> NDArray[np.bool_]:
        _, mask_path = paths[index]
        assert mask_path is not None
        counts = np.bincount(read_mask(mask_path, legend).ravel(), minlength=256)
        return counts[: len(legend.names)] > 0

    return np.stack(_each(present, len(paths), "Counting classes"))


def _each(work: Callable[[int], Any], count: int, title: str) -> list[Any]:
    """What a task gives for each index, in threads (decoding releases the interpreter lock)."""
    with ThreadPoolExecutor() as pool:
        return list(track(pool.map(work, range(count)), title, total=count))

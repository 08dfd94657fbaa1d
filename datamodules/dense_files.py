"""Dense tasks from files: splits, sampling, folders to predict, and a check of all files."""

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from math import inf
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from .base import check_at_least
from .dense import DenseDataModule, DenseSamples, Pairs
from .images import check_splitting, images_to_predict
from .samplers import KeySampler, RepeatFactorSampler, repeat_factors
from .splits import hold_out


class Files(Pairs, Protocol):
    """Images with targets, each read from its files when asked for."""

    @property
    def items(self) -> Sequence[Hashable]:
        """What is known of each image before it is read."""

    @property
    def paths(self) -> Sequence[Path]:
        """The image files."""


class DenseFilesDataModule(DenseDataModule):
    """Image files with annotations; a subclass finds the splits and reads the files.

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
        augment: Scale, crop, mirror and recolour training images at random.
        scale_range: Scales that augmentation draws from; at 1 an image has its own size, which it
            has in evaluation, too.
        photometric: Let augmentation change brightness, contrast, saturation and hue.
        class_balanced: Show training images of rare classes more often, which makes the epoch
            longer. Masks of classes are all read once for it.
        balance_threshold: Classes in a smaller share f of the training images are rare; theirs are
            shown sqrt(balance_threshold / f) times.
        check: Read all files of the coming stage once before it begins, and name those with
            mistakes.
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
        if not 0 < scale_range[0] <= scale_range[1] < inf:
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
        self._splits: dict[str, Sequence[Any]] = {}

    @abstractmethod
    def official_splits(self) -> Mapping[str, Sequence[Any]]:
        """The items of the splits that the data set itself defines, "train" at least."""

    @abstractmethod
    def files(self, name: str, items: Sequence[Any]) -> Files:
        """The images and targets of a split's items."""

    @abstractmethod
    def unlabelled(self, path: Path, number: int) -> Any:
        """The item of an image to predict; numbers count from 1."""

    @abstractmethod
    def transform(self, name: str) -> Callable[[Any], Any]:
        """What is done to the samples of a split."""

    @abstractmethod
    def classes_present(self) -> NDArray[np.bool_]:
        """Which classes are in which training image: [images, classes]."""

    def prepare_data(self) -> None:
        """Also read every file of the coming stage once, if `check` asks for it."""
        super().prepare_data()
        if self.check and self.datasets:
            check_files(samples.pairs for samples in self.datasets.values())

    def split(self, name: str) -> DenseSamples:
        """The samples of a split with its transform; "predict" falls back to "test"."""
        files = self.files(name, self._items(name))
        return DenseSamples(files, list(map(str, files.paths)), self.transform(name), self.seed)

    def _items(self, name: str) -> Sequence[Any]:
        if name == "predict" and self.predict_root is not None:
            paths = images_to_predict(self.predict_root)
            return [self.unlabelled(path, number) for number, path in enumerate(paths, 1)]
        self._splits = self._splits or self._complete(self.official_splits())
        return self._splits["test" if name == "predict" else name]

    def _complete(self, official: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        splits = dict(official)
        if "train" not in splits:
            raise FileNotFoundError(
                f"there are no training images below {self.root}, only {' and '.join(splits)}: add "
                "the folder train"
            )
        if "val" not in splits:
            train = splits["train"]
            kept, held = hold_out([0] * len(train), self.val_fraction, self.seed)
            splits |= {"train": [train[i] for i in kept], "val": [train[i] for i in held]}
        return {"test": splits["val"], **splits}

    def _sampler(self, options: dict[str, Any]) -> KeySampler:
        if not self.class_balanced:
            return super()._sampler(options)
        return RepeatFactorSampler(self._repeats, **options)

    @cached_property
    def _repeats(self) -> NDArray[np.float64]:
        return repeat_factors(self.classes_present(), self.balance_threshold)


def check_files(sources: Iterable[Files]) -> None:
    """Read all files once and raise one error that names those with mistakes."""
    readers: dict[Hashable, Callable[[], Any]] = {}
    for files in sources:
        for index, item in enumerate(files.items):
            readers.setdefault(item, partial(files.__getitem__, index))
    found = each(_mistake, list(readers.values()), "Checking images and annotations")
    raise_mistakes([said for said in found if said], f"of {len(readers)} samples have mistakes")


def _mistake(read: Callable[[], Any]) -> str | None:
    try:
        read()
    except ValueError as reason:
        return str(reason)
    return None


def raise_mistakes(mistakes: Sequence[str], heading: str) -> None:
    """Raise one error that counts the mistakes and shows the first ten, if there are any."""
    if mistakes:
        more = [f"and {len(mistakes) - 10} more"] if len(mistakes) > 10 else []
        raise ValueError("\n".join([f"{len(mistakes)} {heading}:", *mistakes[:10], *more]))


def each(work: Callable[[Any], Any], items: Sequence[Any], title: str) -> list[Any]:
    """What a task gives for each item, in threads (decoding releases the interpreter lock)."""
    with ThreadPoolExecutor() as pool:
        return list(track(pool.map(work, items), title, total=len(items)))

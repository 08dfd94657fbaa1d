"""Your own images with masks, in folders."""

from typing import Any

from .base import SPLITS
from .mask_files import MaskFilesDataModule
from .masks import IGNORE, Color, Legend, Pair, pack_one, pairs_by_stem


class MaskFolderDataModule(MaskFilesDataModule):
    """Images in `root/<split>/images/` with masks in `root/<split>/masks/`, paired by name.

    Split folders are `train`, `val` and `test`; with `root/images/` and `root/masks/` alone,
    splits are made by the seed. Masks hold one class id for each pixel, as 8 or 16 bits or as the
    index of a palette image, or one colour, as `colors` says.

    Args:
        root: The data set's folder.
        class_names: Names of the classes; give these or `colors`.
        colors: Name and colour [red, green, blue] of each class, for masks drawn in colours.
        ids: The id of each class in the masks; 0, 1, 2 ... if none are given. A mask of black and
            white has `ids: [0, 255]`.
        ignore: Ids, or with `colors` colours, of pixels that belong to no class. Of ids it is 255
            if none are given, unless that is a class.
        options: As for every data set of mask files: `crop_size` to `predict_root`.
    """

    def __init__(
        self,
        root: str,
        class_names: list[str] | None = None,
        colors: dict[str, Color] | None = None,
        ids: list[int] | None = None,
        ignore: list[int] | list[Color] | None = None,
        **options: Any,
    ) -> None:
        self.legend = _legend(class_names, colors, ids, ignore)
        super().__init__(root, **options)

    def official_splits(self) -> dict[str, list[Pair]]:
        """The splits that have a folder; all images are "train" if none has."""
        names = [name for name in SPLITS if (self.root / name / "images").is_dir()]
        folders = {name: self.root / name for name in names} or {"train": self.root}
        return {n: pairs_by_stem(at / "images", at / "masks") for n, at in folders.items()}


def _legend(
    class_names: list[str] | None,
    colors: dict[str, Color] | None,
    ids: list[int] | None,
    ignore: Any,
) -> Legend:
    if (class_names is None) == (colors is None):
        raise ValueError("give either class_names, for masks of ids, or colors")
    if colors is None:
        values = ids or range(len(class_names))
        if not all(isinstance(value, int) for value in ignore or []):
            raise ValueError(
                f"ignore {ignore} must be ids, as the masks' values are; or give colors"
            )
        unless_class = [] if IGNORE in values else [IGNORE]
        return Legend(class_names, values, unless_class if ignore is None else ignore)
    if ids is not None:
        raise ValueError("colors stand in the place of ids: leave ids out")
    values = [pack_one(color) for color in colors.values()]
    ignored = [pack_one(color) for color in ignore or []]
    palette = [tuple(color) for color in colors.values()]
    return Legend(list(colors), values, ignored, palette, colored=True)

"""CamVid: street scenes out of a car."""

from .mask_files import MaskFilesDataModule
from .masks import Legend, Pair, pairs_by_stem

_COLORS = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}


class CamVidDataModule(MaskFilesDataModule):
    """CamVid (Brostow et al., 2009) in SegNet's 11 classes, about 4 % of the pixels unlabelled.

    `root` holds `train/`, `trainannot/`, `val/`, `valannot/`, and, if there is a test split,
    `test/` and `testannot/`.
    """

    legend = Legend(tuple(_COLORS), ignored=(11,), palette=tuple(_COLORS.values()))

    def official_splits(self) -> dict[str, list[Pair]]:
        """The splits that have a folder."""
        names = ["train", *(n for n in ("val", "test") if (self.root / n).is_dir())]
        return {n: pairs_by_stem(self.root / n, self.root / f"{n}annot") for n in names}

"""Oxford-IIIT Pet: cats and dogs with trimaps."""

from .mask_files import MaskFilesDataModule
from .masks import Legend, Pair, pairs_in_list


class OxfordPetTrimapsDataModule(MaskFilesDataModule):
    """The trimaps of Oxford-IIIT Pet (Parkhi et al., 2012): pet, background, and its border.

    The border, which the authors call "not classified", is a class here as it is in the tutorials
    that figures are compared with. `root` is the folder `oxford-iiit-pet`, or the one torchvision
    downloaded it to; it holds `images/` and `annotations/`.
    """

    legend = Legend(
        ("pet", "background", "border"),
        values=(1, 2, 3),
        palette=((255, 128, 0), (0, 0, 0), (255, 255, 255)),
    )

    def official_splits(self) -> dict[str, list[Pair]]:
        """The splits "train" (the authors' trainval) and "test"."""
        inner = self.root / "oxford-iiit-pet"
        root = inner if inner.is_dir() else self.root
        annotations = root / "annotations"
        return {
            name: pairs_in_list(annotations / listing, root / "images", annotations / "trimaps")
            for name, listing in {"train": "trainval.txt", "test": "test.txt"}.items()
        }

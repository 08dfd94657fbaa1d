"""Cityscapes: street scenes of German cities."""

from torchvision.datasets import Cityscapes

from .mask_files import MaskFilesDataModule
from .masks import Legend, Pair, pairs_by_stem

_SCORED = sorted(
    (known for known in Cityscapes.classes if not known.ignore_in_eval),
    key=lambda known: known.train_id,
)
_IGNORED = [known.id for known in Cityscapes.classes if known.ignore_in_eval and known.id >= 0]


class CityscapesDataModule(MaskFilesDataModule):
    """Cityscapes (Cordts et al., arXiv 1604.01685), fine annotations, the 19 classes it scores.

    `root` holds `leftImg8bit/` and `gtFine/`; read are the masks `*_gtFine_labelIds.png`. Those of
    the test images are not public: validation images stand in.
    """

    legend = Legend(
        names=[known.name for known in _SCORED],
        values=[known.id for known in _SCORED],
        ignored=_IGNORED,
        palette=[known.color for known in _SCORED],
    )

    def official_splits(self) -> dict[str, list[Pair]]:
        """The splits "train" and "val"."""
        images, masks = self.root / "leftImg8bit", self.root / "gtFine"
        return {
            name: pairs_by_stem(images / name, masks / name, "_leftImg8bit", "_gtFine_labelIds")
            for name in ("train", "val")
        }

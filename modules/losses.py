"""Losses of semantic segmentation: one module that sums them by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = 255

_LIBRARY = {"dice": "DiceLoss", "focal": "FocalLoss", "lovasz": "LovaszLoss"}
LOSSES = ("cross_entropy", *_LIBRARY)


class SegmentationLoss(nn.Module):
    """A weighted sum of losses, over the pixels that are not ignored.

    - ``cross_entropy``: torch's, the mean over pixels, weighted by class if asked.
    - ``dice``: 1 - Dice of probabilities, the batch taken as one image (Milletari et al. 2016). The
      mean is over all classes, and those that are absent from the batch add 0 to it: with 8 of 150
      classes present, the loss is 8 / 150 at most.
    - ``focal``: gamma 2, of each class against the rest by a sigmoid of its logit, and the mean
      over pixels and classes (Lin et al. 2017).
    - ``lovasz``: Lovász-Softmax, the batch taken as one image, the mean over the classes present
      (Berman et al. 2018).

    All but the first are segmentation_models_pytorch's. Logits are taken in float32, in mixed
    precision too. Where every pixel of a batch is ignored, the loss is 0 and so are its gradients:
    on their own, ``cross_entropy`` and ``focal`` would be nan, and ``lovasz`` no scalar.

    Args:
        weights: Weight of each loss by name.
        class_weights: Weight of each class in the cross-entropy, and there only.
        label_smoothing: Share of each label that is spread over all classes, in the cross-entropy.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        weights: Mapping[str, float],
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check(weights, class_weights, label_smoothing)
        self.weights = dict(weights)
        self.label_smoothing = label_smoothing
        weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float)
        self.register_buffer("class_weights", weight, persistent=False)
        self.others = nn.ModuleDict({n: _from_library(n) for n in weights if n in _LIBRARY})

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        """The loss, a float32 scalar.

        Args:
            logits: ``[n, C, h, w]``.
            masks: Class ids ``[n, h, w]`` of any integer type; 255 is ignored.
        """
        logits, masks = logits.float(), masks.long()
        if (masks == IGNORED).all():
            return 0.0 * logits.sum()
        losses = [w * self._one(name, logits, masks) for name, w in self.weights.items()]
        return torch.stack(losses).sum()

    def _one(self, name: str, logits: Tensor, masks: Tensor) -> Tensor:
        if name in self.others:
            return self.others[name](logits, masks)
        return F.cross_entropy(
            logits,
            masks,
            weight=None if self.class_weights is None else self.class_weights.float(),
            ignore_index=IGNORED,
            label_smoothing=self.label_smoothing,
        )


def _from_library(name: str) -> nn.Module:
    try:
        from segmentation_models_pytorch import losses
    except ImportError as error:
        raise ImportError(
            f"{name} is a loss of segmentation-models-pytorch: pip install 'litflora[dense]'"
        ) from error
    return getattr(losses, _LIBRARY[name])(losses.MULTICLASS_MODE, ignore_index=IGNORED)


def _check(
    weights: Mapping[str, float], class_weights: Sequence[float] | None, label_smoothing: float
) -> None:
    for name, weight in weights.items():
        if name not in LOSSES:
            raise ValueError(f"unknown loss {name!r}: there are {', '.join(LOSSES)}")
        if not 0 <= weight < inf:
            raise ValueError(f"the weight of {name} must be finite and 0 or more, not {weight}")
    if not any(weights.values()):
        raise ValueError("no loss has a weight: give at least one, as {'cross_entropy': 1.0}")
    if class_weights is not None and not all(0 < w < inf for w in class_weights):
        raise ValueError(
            f"class_weights must be finite and above 0, not {list(class_weights)}: "
            f"pixels that are to count for nothing are {IGNORED} in the mask"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1), not {label_smoothing}")
    if "cross_entropy" not in weights and (class_weights is not None or label_smoothing):
        raise ValueError(
            "class_weights and label_smoothing are for cross_entropy: give it a weight"
        )

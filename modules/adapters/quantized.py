"""Weights that are held in fewer bits than they are computed in.

Such a weight is a tensor of a class of its own, with the shape and the type that it had, whose
values are made anew in each operation. The engine knows it by ``original_fingerprint``, the digest
of the weight that it was made of: this is the base that an adapter belongs to.
"""

from __future__ import annotations

from torch import Tensor, nn


def original_fingerprint(weight: Tensor) -> str | None:
    """The digest of the weight that a quantised one was made of; None of any other."""
    return getattr(weight, "original_fingerprint", None)


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is held in fewer bits."""
    return original_fingerprint(weight) is not None


def first_quantized(model: nn.Module) -> str | None:
    """The name of a quantised weight of the model; None if it has none."""
    return next((name for name, p in model.named_parameters() if is_quantized(p)), None)

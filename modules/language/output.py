"""What a network of a tower, a connector and a language model gives, and its loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .encoding import IGNORED


class Output(NamedTuple):
    """What a call gives.

    Attributes:
        loss: Mean over the tokens that are learnt, None without labels.
        logits: ``[batch, length, vocabulary]``, None if there was nothing but a prompt.
        tokens: What a prompt is gone on with, None without one.
    """

    loss: Tensor | None
    logits: Tensor | None
    tokens: Tensor | None = None


def token_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of each next token that is to be learnt.

    Args:
        logits: ``[batch, length, vocabulary]``.
        labels: ``[batch, length]``, -100 where nothing is to be learnt.
        reduction: ``mean``, or ``none``: of each of the ``batch * (length - 1)`` tokens.
    """
    following = labels[:, 1:].reshape(-1)
    told = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(told, following, ignore_index=IGNORED, reduction=reduction)

"""How good answers are."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import SacreBLEUScore
from torchmetrics.utilities import dim_zero_cat

from ..processes import gather_in_order
from .vqa_answers import vqa_normalized

MARKS = " .,;:!?\"'"


def normalized(answer: str) -> str:
    """An answer without what makes no difference: case, a first article, marks at its ends."""
    said = " ".join(answer.lower().split()).strip(MARKS)
    return re.sub(r"^(a|an|the) ", "", said).strip(MARKS)


def is_exact(answer: str, accepted: Sequence[str]) -> bool:
    """Whether an answer is one of those that count as right, but for what `normalized` drops."""
    return normalized(answer) in map(normalized, accepted)


def vqa_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """The accuracy of VQA (Antol et al., arXiv:1505.00468): three people who say it make it right.

    It is the mean over all choices of all people but one. With fewer than three people's answers
    each of them counts as right. Answers are compared by `vqa_normalized`.

    Args:
        answer: What was said.
        accepted: The answers of people.
    """
    found = vqa_normalized(answer)
    said = [found == vqa_normalized(other) for other in accepted]
    if len(said) < 3:
        return float(any(said))
    others = [sum(said) - own for own in said]
    return sum(min(count / 3, 1) for count in others) / len(said)


class AnswerMean(Metric):
    """The mean of a number of each answer, the same however they are spread over processes.

    Nan is the number of an answer that it does not count, and the mean of none.
    """

    full_state_update = False
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__(dist_sync_fn=gather_in_order)
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, values: Sequence[float] | Tensor) -> None:
        """Counts answers."""
        self.values.append(torch.as_tensor(values, dtype=torch.float64, device=self.device))

    def compute(self) -> Tensor:
        """Their mean, float32."""
        return dim_zero_cat(self.values).nanmean().float()


class TokenLoss(Metric):
    """The loss per token that is to be learnt, the same however samples are spread."""

    full_state_update = False
    sums: list[Tensor]
    counts: list[Tensor]

    def __init__(self) -> None:
        super().__init__(dist_sync_fn=gather_in_order)
        for state in ("sums", "counts"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, losses: Tensor, labels: Tensor) -> None:
        """Counts samples.

        Args:
            losses: Of each token, 0 where nothing is learnt: ``[batch, length - 1]``.
            labels: ``[batch, length]``, -100 where nothing is learnt.
        """
        self.sums.append(losses.double().sum(1))
        self.counts.append((labels[:, 1:] >= 0).sum(1))

    def compute(self) -> Tensor:
        """The mean over all tokens."""
        return (dim_zero_cat(self.sums).sum() / dim_zero_cat(self.counts).sum()).float()


class Bleu(SacreBLEUScore):
    """BLEU-4 of lower-case text, tokenised as sacreBLEU's 13a does, the same however it is spread.

    Nan while there is no answer.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__(lowercase=True)

    def compute(self) -> Tensor:
        """The score of the whole set, 0 to 1."""
        return super().compute() if self.target_len else self.target_len.new_full((), torch.nan)


def are_sentences(accepted: Sequence[str], closed: bool | None) -> bool:
    """Whether answers are to be measured by BLEU, which counts runs of four words.

    Data sets of questions say of each whether it is closed; captions and conversations do not.
    """
    return closed is None and min(len(answer.split()) for answer in accepted) >= 4

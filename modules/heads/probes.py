"""Classifiers that are fitted to features at once, with no training of the network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class NearestNeighbours:
    """Votes of the most similar features, as DINO counts them (Caron et al., arXiv 2104.14294).

    The 20 neighbours of largest cosine vote for their classes, with weights exp(cosine / 0.07).

    Args:
        features: Floats ``[N, D]``.
        labels: Their classes, integers ``[N]``.
        num_classes: How many classes there are.
    """

    neighbours = 20
    temperature = 0.07

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        self.features = F.normalize(features)
        self.labels, self.num_classes = labels, num_classes

    def __call__(self, features: Tensor) -> Tensor:
        """Sums of votes ``[M, num_classes]`` for features ``[M, D]``."""
        cosines = F.normalize(features) @ self.features.t()
        nearest, index = cosines.topk(min(self.neighbours, len(self.features)))
        weights = (nearest / self.temperature).exp()
        votes = weights.new_zeros(len(features), self.num_classes)
        return votes.scatter_add_(1, self.labels[index], weights)


class LinearProbe:
    """Logistic regression on standardised features.

    L-BFGS begins from zero, so that equal features give equal probes.

    Args:
        features: Floats ``[N, D]``.
        labels: Their classes, integers ``[N]``.
        num_classes: How many classes there are.
    """

    steps = 200
    decay = 1e-3

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        self.mean = features.mean(0)
        self.std = features.std(0, correction=0).clamp(min=1e-6)
        inputs = (features - self.mean) / self.std
        self.weight = inputs.new_zeros(num_classes, inputs.shape[1], requires_grad=True)
        self.bias = inputs.new_zeros(num_classes, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias], max_iter=self.steps, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = F.linear(inputs, self.weight, self.bias)
            value = F.cross_entropy(logits, labels) + self.decay * self.weight.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Logits ``[M, num_classes]`` of features ``[M, D]``."""
        return F.linear((features - self.mean) / self.std, self.weight, self.bias)

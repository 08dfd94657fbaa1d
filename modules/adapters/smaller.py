"""Deltas without the slices that a rank budget has set to zero (see `budget`)."""

from __future__ import annotations

import torch

from .delta import Delta
from .split import SplitDelta


def without_zeros(delta: Delta) -> Delta | None:
    """A delta without its slices that are zero, if a budget rules it; dW is the same.

    Returns:
        The delta itself, a smaller one, or None where nothing is left.
    """
    if isinstance(delta, SplitDelta):
        leaves = {str(i): leaf for i, (_, leaf) in enumerate(delta.leaves()) if leaf is not None}
        rest = {i: left for i, leaf in leaves.items() if (left := without_zeros(leaf)) is not None}
        return SplitDelta(delta.info, delta.sizes, rest) if rest else None
    if not delta.budgeted:
        return delta
    state, ranks = delta.state_dict(), list(delta.ranks())
    for mode in delta.rank_modes():
        gate, dim = mode.tensors[0]
        size = ranks[mode.place]
        alive = state[gate].movedim(dim, 0).reshape(size, -1).any(1)
        kept = alive.nonzero().flatten()
        if len(kept) < mode.least:
            kept = torch.arange(mode.least, device=kept.device)
        ranks[mode.place] = len(kept)
        for name, dim in mode.tensors:
            state[name] = state[name].index_select(dim, kept)
    if 0 in ranks:
        return None
    smaller = delta.with_ranks(ranks)
    smaller.load_state_dict(state, assign=True)
    return smaller

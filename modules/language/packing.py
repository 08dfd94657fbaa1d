"""Several conversations in one row of tokens, none of which sees another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Which samples share a row: the longest first, each in the first row that has room.

    Args:
        lengths: Of each sample, none above the limit.
        limit: Of a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        found = next((row for row, left in enumerate(room) if left >= lengths[index]), len(rows))
        if found == len(rows):
            rows.append([])
            room.append(limit)
        rows[found].append(index)
        room[found] -= lengths[index]
    return rows


def places(lengths: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Where the tokens of packed rows are, and which of them see which.

    Args:
        lengths: Of the samples in each row.

    Returns:
        Positions ``[rows, longest]``, int64, which count from 0 in each sample; and a mask ``[rows,
        1, longest, longest]``, bool: each token sees those before it in its own sample, and itself.
        Padding is a sample of its own, so that no token sees nothing: its softmax would be nan.
    """
    longest = max(map(sum, lengths))
    filled = [[*row, longest - sum(row)] for row in lengths]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in filled])
    samples = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in filled]
    )
    same = samples[:, None, :, None] == samples[:, None, None, :]
    return positions, same.tril()

"""The product of a core with its factors, whatever order its modes are taken in."""

from __future__ import annotations

import itertools
import math
import string

import pytest
import torch
from torch import Tensor

from litflora.adapters.tucker import Factors, expand

# Sizes and ranks: modes that grow more and less than their neighbours, or not at all.
FORMS = [
    ((6, 10), (2, 3)),
    ((3, 12), (3, 2)),
    ((12, 3), (2, 3)),
    ((9, 3, 4, 4), (2, 3, 2, 2)),
    ((9, 6, 3, 3), (2, 2, 3, 3)),
    ((4, 9, 3, 1), (4, 2, 2, 1)),
    ((5, 4, 6), (5, 2, 2)),
    ((4, 3, 2, 3, 4), (2, 3, 2, 1, 2)),
]


def by_definition(core: Tensor, factors: Factors) -> Tensor:
    old, new = string.ascii_lowercase[: core.dim()], string.ascii_uppercase[: core.dim()]
    eyes = [
        torch.eye(n).double() if f is None else f for n, f in zip(core.shape, factors, strict=True)
    ]
    pairs = ",".join(map(str.__add__, new, old))
    return torch.einsum(f"{old},{pairs}->{new}", core, *eyes)


@pytest.mark.parametrize(("sizes", "ranks"), FORMS)
@pytest.mark.parametrize("strided", [False, True])
def test_equals_its_definition(
    sizes: tuple[int, ...], ranks: tuple[int, ...], strided: bool
) -> None:
    torch.manual_seed(0)
    for which in itertools.product((True, False), repeat=len(sizes)):
        core = torch.randn(ranks, dtype=torch.float64)
        if strided:
            core = core.movedim(0, -1).contiguous().movedim(-1, 0)
        made = [torch.randn(n, r, dtype=torch.float64) for n, r in zip(sizes, ranks, strict=True)]
        factors = [factor if has else None for factor, has in zip(made, which, strict=True)]
        tensors = [core.requires_grad_(), *(f.requires_grad_() for f in factors if f is not None)]
        got, want = expand(core, factors), by_definition(core, factors)
        torch.testing.assert_close(got, want)
        gy = torch.randn_like(want)
        torch.testing.assert_close(
            torch.autograd.grad(got, tensors, gy), torch.autograd.grad(want, tensors, gy)
        )


@pytest.mark.parametrize(("sizes", "ranks"), FORMS)
def test_keeps_nothing_as_large_as_what_it_makes(
    sizes: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    assert largest_kept(sizes, ranks) < math.prod(sizes)


def test_the_mode_that_grows_more_is_widened_last() -> None:
    assert largest_kept((9, 6, 3), (5, 5, 3)) == 5 * 6 * 3
    assert largest_kept((6, 9, 3), (5, 5, 3)) == 6 * 5 * 3


def largest_kept(sizes: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    """Numbers in the largest tensor that backward keeps."""
    core = torch.randn(ranks, requires_grad=True)
    pairs = zip(sizes, ranks, strict=True)
    factors = [torch.randn(n, r, requires_grad=True) for n, r in pairs]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        expand(core, factors)
    return max(kept)

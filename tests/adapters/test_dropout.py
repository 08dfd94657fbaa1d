"""Dropout on the chain's input: the mask is drawn twice, by blocks of rows or at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from litflora.adapters import LoRA, inject
from litflora.adapters.dropout import ROWS, Dropout
from litflora.adapters.maps import LinearMap

from .cases import Holder, factors, randomize

X = {  # several blocks, the last of them not whole; one short block; tokens in a batch
    "many": (2 * ROWS + 5, 7),
    "few": (3, 7),
    "batch": (3, ROWS - 1, 7),
    "one": (7,),
    "none": (0, 7),
}


def built(layer: nn.Module, p: float = 0.3) -> Holder:
    torch.manual_seed(0)
    model = Holder(layer).double()
    inject(model, LoRA(rank=3, dropout=p, targets="layer"))
    randomize(model)
    return model.train()


def gradients(model: Holder, x: Tensor, **options: Any) -> list[Tensor]:
    torch.manual_seed(5)  # of the mask's seed
    y = model(x)
    return list(torch.autograd.grad(y.pow(3).sum(), [x, *factors(model)], **options))


@pytest.mark.parametrize("shape", X)
def test_blocks_of_rows_drop_what_the_whole_drops(shape: str) -> None:
    """With a graph of the gradients wanted, the mask is drawn and applied at once."""
    model = built(nn.Linear(7, 5))
    x = torch.randn(X[shape], dtype=torch.float64, requires_grad=True)
    for one, other in zip(gradients(model, x), gradients(model, x, create_graph=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Conv1d(7, 5, 3, padding=1)])
def test_gradients_are_those_of_what_forward_dropped(layer: nn.Module) -> None:
    model = built(layer)
    shape = (2 * ROWS + 5, 7) if isinstance(layer, nn.Linear) else (2, 7, 11)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = gradients(model, x)
    leaves = [x, *factors(model)]
    directions = [torch.randn_like(leaf) for leaf in leaves]
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf += step * direction
        torch.manual_seed(5)
        values.append(model(x).pow(3).sum())
    slope = (values[0] - values[1]) / 2e-6
    inner = sum((g * d).sum() for g, d in zip(wanted, directions, strict=True))
    torch.testing.assert_close(inner, slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_as_many_are_dropped_as_asked(p: float, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    drop, x = Dropout(p, seed=3), torch.ones(1000, 1000, device=device)
    kept = drop.hidden(LinearMap(), x, torch.eye(1000, device=device))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(1 - kept.mean().item() - p) < 5 * deviation + 1e-5
    assert drop.amplified(torch.ones(1)).item() == pytest.approx(1 / (1 - p), rel=0.02)
    both = kept[:, 1:] * kept[:, :-1]  # neighbours are independent
    assert abs(both.mean().item() - (1 - p) ** 2) < 0.005
    assert (kept[:ROWS] != kept[ROWS : 2 * ROWS]).any() or p < 0.01


def test_another_seed_drops_others() -> None:
    x, eye = torch.ones(50, 50), torch.eye(50)
    one, other, again = (Dropout(0.5, s).hidden(LinearMap(), x, eye) for s in (1, 2, 1))
    assert torch.equal(one, again)
    assert 0.4 < (one != other).float().mean() < 0.6


def test_half_precision_sums_many_blocks_as_exactly_as_few() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32))
    inject(net, LoRA(rank=4, dropout=0.1, targets="linear"))
    randomize(net)
    x, gradients = torch.randn(200 * ROWS, 64) + 0.5, []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = net(x)
        gradients.append(torch.autograd.grad(y.float().sum(), factors(net)))
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() / expected.norm() < 0.01


def test_blocks_are_taken_where_they_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    masks = Dropout._masks

    def counted(self: Dropout, rows: Tensor) -> Any:
        for block, mask in masks(self, rows):
            drawn.append(len(mask))
            yield block, mask

    monkeypatch.setattr(Dropout, "_masks", counted)
    x = torch.randn(X["many"], dtype=torch.float64, requires_grad=True)
    gradients(built(nn.Linear(7, 5)), x)
    assert drawn == 2 * [ROWS, ROWS, 5]

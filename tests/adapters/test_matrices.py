"""MoRA against its definition on vectors, LoHa and LoKr against PEFT."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from litflora.adapters import AdapterError, DeltaTuning, DoRA, LoHa, LoKr, MoRA, WeightInfo, inject
from litflora.adapters.lokr import divided

from .cases import BY_ID, METHODS, assert_close, deltas, gradients, randomize, relative_error
from .toys import net, unchanged


def of(layer: nn.Module, tuning: Any) -> Any:
    """The delta of a tuning on one layer, filled with noise."""
    model = nn.Sequential(layer.double())
    inject(model, tuning)
    randomize(model)
    return deltas(model)["0.weight"]


# MoRA -------------------------------------------------------------------------------------------


def compress(x: list[float], side: int) -> list[list[float]]:
    """The input in chunks, the last of which goes on at the input's beginning."""
    count = math.ceil(len(x) / side)
    return [[x[(c * side + j) % len(x)] for j in range(side)] for c in range(count)]


def turn(chunk: list[float], position: int) -> list[float]:
    """A rotary embedding: number j and the one half a chunk further are turned by one angle."""
    half = len(chunk) // 2
    turned = list(chunk)
    for j in range(half):
        angle = position * 10000.0 ** (-2 * j / len(chunk))
        first, second = chunk[j], chunk[half + j]
        turned[j] = first * math.cos(angle) - second * math.sin(angle)
        turned[half + j] = second * math.cos(angle) + first * math.sin(angle)
    return turned


def mora(square: Tensor, x: Tensor, out: int, kind: str) -> Tensor:
    """``decompress(M compress(x))`` of one vector, chunk by chunk."""
    chunks = compress(x.tolist(), len(square))
    if kind == "sharing":
        chunks = [[sum(column) for column in zip(*chunks, strict=True)]]
    else:
        chunks = [turn(chunk, position) for position, chunk in enumerate(chunks)]
    y = torch.cat([square @ torch.tensor(chunk, dtype=square.dtype) for chunk in chunks])
    return torch.stack([y[o % len(y)] for o in range(out)])


@pytest.mark.parametrize("kind", ["sharing", "rope"])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(16, 16), (6, 9), (23, 7), (7, 23), (40, 12), (12, 40), (1, 5), (5, 1)]
)
def test_mora_is_its_definition(inputs: int, outputs: int, kind: str) -> None:
    delta = of(nn.Linear(inputs, outputs), MoRA(rank=2, kind=kind, targets="0"))  # type: ignore[arg-type]
    x = torch.randn(inputs, dtype=torch.float64)
    assert_close(delta.dense() @ x, mora(delta.square, x, outputs, kind), 1e-12)


def test_mora_turns_as_far_in_half_precision() -> None:
    """By many positions: the angles of the last chunks would be wrong by whole radians."""
    delta = of(nn.Linear(4096, 600), MoRA(rank=1, targets="0")).float().bfloat16()
    half = delta.dense().float()
    exact = delta.float().dense()
    assert_close(half, exact, 2e-2)


@pytest.mark.parametrize("kind", ["sharing", "rope"])
def test_mora_takes_a_kernel_as_the_map_of_a_patch(kind: str) -> None:
    tuning = MoRA(rank=1, kind=kind, targets="0")  # type: ignore[arg-type]
    delta = of(nn.Conv2d(4, 6, (3, 2), groups=2), tuning)
    x = torch.randn(2, 3, 2, dtype=torch.float64)
    expected = mora(delta.square, x.flatten(), 6, kind)
    assert_close((delta.dense() * x).sum((1, 2, 3)), expected, 1e-12)
    delta = of(nn.ConvTranspose1d(4, 6, 3), tuning)
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = mora(delta.square, x.flatten(), 6, kind)
    assert_close(torch.einsum("iok,ik->o", delta.dense(), x), expected, 1e-12)


@pytest.mark.parametrize(
    ("shape", "rank", "kind", "side"),
    [
        ((4096, 4096), 8, "sharing", 256),
        ((11008, 4096), 8, "sharing", 348),  # 347.6
        ((4096, 4096), 7, "rope", 238),  # 239.5, and even
        ((4096, 16), 8, "sharing", 16),  # 181, but no more than the smaller side
    ],
)
def test_side_of_mora(shape: tuple[int, int], rank: int, kind: Any, side: int) -> None:
    info = WeightInfo("w", shape, "linear", device=torch.device("meta"))
    delta = MoRA(rank=rank, kind=kind).build(info, {})
    assert tuple(delta.square.shape) == (side, side)
    assert delta.clamped == (16 in shape)


# PEFT -------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 18), (4, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), padding=1), (2, 6, 6, 5)),
    "conv2d-groups": (lambda: nn.Conv2d(8, 12, 3, groups=2), (2, 8, 6, 5)),
    "conv2d-1x1": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 4, 3)),
}
PEFT: dict[str, tuple[str, dict[str, Any], DeltaTuning]] = {
    # PEFT holds LoHa's scale in float32: this one is exact there.
    "loha": ("LoHaConfig", {"r": 3, "alpha": 6}, LoHa(rank=3, alpha=6.0)),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 5}, LoKr(rank=1, alpha=5.0)),
    "lokr-full": ("LoKrConfig", {"r": 4, "alpha": 5}, LoKr(rank=4, alpha=5.0)),
    "lokr-both": (
        "LoKrConfig",
        {"r": 1, "alpha": 5, "decompose_both": True},
        LoKr(rank=1, alpha=5.0, decompose_both=True),
    ),
    "lokr-factor": (
        "LoKrConfig",
        {"r": 1, "alpha": 5, "decompose_factor": 2},
        LoKr(rank=1, alpha=5.0, decompose_factor=2),
    ),
}


# PEFT multiplies C with the whole kernel of a Conv1d as if C's modes were the kernel's last two.
PAIRS = [(kind, m) for kind in LAYERS for m in PEFT if (kind, m) != ("conv1d", "lokr-full")]


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_values_and_gradients_are_pefts(kind: str, method: str) -> None:
    peft = pytest.importorskip("peft")
    build, shape = LAYERS[kind]
    name, options, tuning = PEFT[method]
    base, x = nn.Sequential(build()).double(), torch.randn(shape, dtype=torch.float64)
    config = getattr(peft, name)(target_modules=["0"], init_weights=False, **options)
    theirs = peft.get_peft_model(deepcopy(base), config)
    ours = deepcopy(base)
    tuning.targets = "0"
    inject(ours, tuning)
    named = [p for p in theirs.parameters() if p.requires_grad]
    own = list(deltas(ours)["0.weight"].tensors())
    assert [p.numel() for p in own] == [p.numel() for p in named]
    with torch.no_grad():
        for mine, other in zip(own, named, strict=True):
            mine.copy_(other.reshape(mine.shape))
    expected, y = theirs(x), ours(x)
    assert relative_error(base(x), expected) > 1e-2
    assert_close(y, expected, 1e-10)
    pairs = zip(gradients(y, own), gradients(expected, named), strict=True)
    for n, (got, want) in enumerate(pairs):
        assert_close(got, want.reshape(got.shape), 1e-10, f"gradient {n}")


def test_lokr_is_its_definition() -> None:
    """``dW[(j k), (m n), t] = s C[j, m] W2[k, (n t)]``, also where PEFT's code is not that."""
    delta = of(nn.Conv1d(6, 8, 3), LoKr(rank=4, alpha=2.0, targets="0"))
    first, second = delta.tensors()  # [2, 2] and [4, 3 * 3]
    expected = torch.einsum("jm,knt->jkmnt", first, second.view(4, 3, 3)) / 2
    assert_close(delta.dense(), expected.reshape(8, 6, 3), 1e-14)


def test_sides_are_divided_as_in_peft() -> None:
    theirs = pytest.importorskip("peft.tuners.lokr.layer").factorization
    for size in range(1, 200):
        for factor in (-1, 1, 2, 4, 5, 7, 16, 300):
            assert divided(size, factor) == theirs(size, factor), (size, factor)


# What they are not defined for ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dora", "mora", "loha", "lokr", "adalora"])
def test_stacks_of_matrices_are_refused(method: str) -> None:
    case = BY_ID["raw-3d-experts"]
    model = case.model()
    with unchanged(model), pytest.raises(AdapterError, match=r"layer\.gate_up is a stack of mat"):
        inject(model, METHODS[method](targets=case.target))


@pytest.mark.parametrize("cls", [DoRA, MoRA, LoHa, LoKr])
def test_several_ranks_are_refused(cls: type[DeltaTuning]) -> None:
    model = net()
    with unchanged(model), pytest.raises(AdapterError, match=f"{cls.__name__} has one rank"):
        inject(model, cls(targets="stem", rank_pattern={"stem": [2, 2]}))


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(AdapterError, match="kind must be 'sharing' or 'rope'"):
        MoRA(kind="type6")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="decompose_factor must be a whole number"):
        LoKr(decompose_factor=0)
    with pytest.raises(AdapterError, match="alpha must be a finite number"):
        LoHa(alpha=float("nan"))

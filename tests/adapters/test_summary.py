"""What the summary says: ranks, counts, paths, bytes and warnings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from litflora.adapters import FLoRA, LoRA, Summary, inject, summary

from .cases import deltas, factors
from .toys import Net, images, net, saved_bytes, unchanged


def count(tuning: Any, layer: nn.Module) -> tuple[int, Summary]:
    model = nn.Sequential(nn.Identity(), layer)
    report = inject(model, tuning)
    assert report.adapter_params == sum(p.numel() for p in factors(model))
    return report.adapter_params, report


def conv() -> nn.Module:
    return nn.Conv2d(256, 512, 3)


def linear() -> nn.Module:
    return nn.Linear(256, 512)


def depthwise() -> nn.Module:
    return nn.Conv2d(768, 768, 7, padding=3, groups=768)


@pytest.mark.parametrize(
    ("tuning", "layer", "expected"),
    [
        (FLoRA(rank=32, spatial_rank=2, targets="all"), conv, 28_684),
        (LoRA(rank=32, targets="all", conv="peft"), conv, 90_112),
        (LoRA(rank=32, targets="all", conv="loralib"), conv, 221_184),
        (LoRA(rank=32, targets="all", conv="article"), conv, 73_728),
        (FLoRA(rank=32, targets="all"), linear, 25_600),
        (LoRA(rank=32, targets="all"), linear, 24_576),
        (FLoRA(rank=8, spatial_rank=2, targets="all"), depthwise, 6_204),
    ],
    ids=[
        "flora_conv",
        "lora_peft",
        "lora_loralib",
        "lora_article",
        "flora_linear",
        "lora_linear",
        "flora_depthwise",
    ],
)
def test_worked_counts(tuning: Any, layer: Any, expected: int) -> None:
    assert count(tuning, layer())[0] == expected


def test_summary_names_the_three_forms_of_lora() -> None:
    _, report = count(FLoRA(rank=32, targets="all"), conv())
    assert report.rows[0].lora_params == {"peft": 90_112, "loralib": 221_184, "article": 73_728}
    text = str(report)
    for figure in ("28,684", "90,112", "221,184", "73,728"):
        assert figure in text
    _, report = count(FLoRA(rank=32, targets="all"), linear())
    assert set(report.rows[0].lora_params.values()) == {24_576}


@pytest.mark.parametrize(
    ("tuning", "layer", "ranks", "clamped"),
    [
        (FLoRA(rank=16, spatial_rank=2, targets="all"), nn.Conv2d(3, 64, 4), (16, 3, 2, 2), True),
        (
            FLoRA(rank=16, spatial_rank=4, targets="all"),
            nn.Conv2d(32, 64, (1, 3)),
            (16, 16, 1, 3),
            True,
        ),
        (
            FLoRA(rank=16, spatial_rank=2, targets="all"),
            nn.Conv2d(32, 64, 1),
            (16, 16, 1, 1),
            False,
        ),
        (
            FLoRA(rank=8, spatial_rank=2, targets="all"),
            nn.Conv2d(32, 32, 7, groups=32),
            (8, 1, 2, 2),
            False,
        ),
        (FLoRA(rank=8, targets="all"), nn.Linear(8, 32), (8, 8), False),
        (FLoRA(rank=9, targets="all"), nn.Linear(8, 32), (9, 8), True),
        (FLoRA(rank=16, targets="all"), nn.Conv2d(64, 64, 3, groups=16), (16, 4, 2, 2), True),
        (LoRA(rank=16, targets="all"), nn.Linear(4, 32), (4,), True),
        (LoRA(rank=4, targets="all"), nn.Linear(4, 32), (4,), False),
    ],
    ids=[
        "stem",
        "kernel",
        "pointwise",
        "depthwise",
        "exact",
        "linear",
        "groups",
        "lora",
        "lora_exact",
    ],
)
def test_ranks_are_clamped_and_said_to_be(
    tuning: Any, layer: nn.Module, ranks: Any, clamped: bool
) -> None:
    """Clamped = less than was asked; a mode of size 1 carries no factor and no rank."""
    _, report = count(tuning, layer)
    (row,) = report.rows
    assert tuple(row.ranks) == ranks
    assert row.clamped == clamped


def test_a_delta_larger_than_its_layer_is_warned_of() -> None:
    layer = nn.Conv2d(16, 16, 7, groups=16)
    _, report = count(FLoRA(rank=16, spatial_rank=7, targets="all"), layer)
    assert report.rows[0].params > report.rows[0].full_params == 16 * 49
    (warning,) = report.warnings
    assert warning.startswith("1")
    assert f"{report.rows[0].params:,}" in warning
    assert warning in str(report)
    _, report = count(FLoRA(rank=2, targets="all"), nn.Conv2d(16, 16, 7, groups=16))
    assert not report.warnings


def test_totals() -> None:
    model, size = net(), sum(p.numel() for p in net().parameters())
    report = inject(model, FLoRA(rank=3, targets="all"), train=["head"])
    own = sum(p.numel() for p in factors(model))
    head = sum(p.numel() for p in model.head.parameters())
    for figures in (report, summary(model)):
        assert figures.total == size
        assert figures.adapter_params == own == sum(row.params for row in figures.rows)
        assert figures.trainable == own + head
        assert figures.saved_bytes is None
    rows = {f"{row.layer}.{row.param}": row for row in report.rows}
    assert rows.keys() == deltas(model).keys()
    for name, row in rows.items():
        weight = net().get_parameter(name)
        assert row.shape == tuple(weight.shape)
        assert row.full_params == weight.numel()
        assert row.path in ("side", "merged")
    kinds = {row.layer: row.kind for row in report.rows}
    assert kinds == {
        "stem": "conv",
        "dw": "depthwise",
        "mlp.0": "linear",
        "mlp.2": "linear",
        "attn": "attention",
        "attn.out_proj": "attention",
    }


def test_shared_parameters_count_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.out = nn.Linear(4, 10, bias=False)
            self.out.weight = self.embed.weight
            self.first = self.again = nn.Linear(4, 4)

    model = Shared()
    report = inject(model, FLoRA(rank=2, targets="first"))
    assert report.total == 40 + 20
    assert report.trainable == report.adapter_params == 4 + 8 + 8
    assert [row.layer for row in report.rows] == ["first"]


def test_frozen_factors_are_saved_but_not_counted_as_trained() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    report = inject(model, FLoRA(rank=4, freeze_factors=True, targets="all"))
    assert report.trainable == 4 * 4 * 2 * 2
    assert report.adapter_params == report.rows[0].params == 64 + 2 * 32 + 2 * 6
    assert "of which in deltas 64 beside 76 frozen" in str(report)


@pytest.mark.parametrize("path", ["side", "merged", "auto"])
def test_saved_bytes_are_what_autograd_keeps(path: str) -> None:
    model: Net = net()
    inject(model, FLoRA(rank=2, targets=["stem", "dw", "mlp.*"], path=path), train=["head"])  # type: ignore[arg-type]
    with unchanged(model):
        report = summary(model, images())
    assert report.saved_bytes == saved_bytes(model, images())
    assert "MiB" in str(report)


def test_an_example_changes_nothing() -> None:
    """Not even the statistics of batch norms, or the random state that dropout goes by."""
    model = net().train()
    inject(model, FLoRA(rank=2, targets="mlp.*", dropout=0.5))
    state = torch.get_rng_state()
    with unchanged(model):
        summary(model, images())
    assert torch.equal(torch.get_rng_state(), state)


def test_summary_of_a_plain_model() -> None:
    report = summary(net(), (images(),))
    assert not report.rows
    assert report.adapter_params == 0
    assert report.trainable == report.total == sum(p.numel() for p in net().parameters())
    assert report.saved_bytes
    assert str(report)


def test_the_table_shows_each_layer() -> None:
    report = inject(net(), FLoRA(rank=16, targets="all"))
    text = str(report)
    for row in report.rows:
        assert f"{row.layer}.{row.param}" in text
        assert f"{row.params:,}" in text
    assert len({len(line) for line in text.splitlines()[:2]}) <= 2
    assert max(map(len, text.splitlines())) < 140


class ReadsWeights(nn.Module):
    """As timm's EVA: the layer's weight is read and its forward passed by."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(self.called(x), self.read.weight)


def test_a_layer_that_is_passed_by_is_warned_of() -> None:
    model = ReadsWeights()
    inject(model, LoRA(targets="linear"))
    (warning,) = summary(model, torch.randn(2, 64)).warnings
    assert "read was not called" in warning

"""Which weights a tuning reaches, and with which settings."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from litflora.adapters import AdapterError, FLoRA, LoRA, inject

from .cases import deltas
from .toys import unchanged


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc10 = nn.Linear(2 * width, 2 * width)  # its name begins with another's
        self.fc2 = nn.Linear(2 * width, width)


class Tower(nn.Module):
    """Names as they occur in backbones: numbered stages and blocks, prefixes of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.stages = nn.ModuleList(nn.ModuleList([Block(8), Block(8)]) for _ in range(2))
        self.stages_extra = nn.Linear(8, 8)
        self.down = nn.Conv2d(8, 8, 2, stride=2)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.words = nn.Embedding(5, 8)
        self.attn = nn.MultiheadAttention(8, 2)
        self.table = nn.Parameter(torch.randn(4, 8))
        self.position = nn.Parameter(torch.randn(1, 4, 8))
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 3)


BLOCKS = [f"stages.{stage}.{block}" for stage in range(2) for block in range(2)]
LINEAR = {f"{b}.{fc}" for b in BLOCKS for fc in ("fc1", "fc10", "fc2")} | {
    "stages_extra",
    "pointwise",
}
DEPTHWISE = {f"{b}.dw" for b in BLOCKS}
ATTENTION = {"attn.in_proj_weight", "attn.out_proj"}

SELECTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "default": ({}, LINEAR),
    "linear": ({"targets": "linear"}, LINEAR),
    "conv": ({"targets": "conv"}, {"stem", "down"}),
    "depthwise": ({"targets": "depthwise"}, DEPTHWISE),
    "embedding": ({"targets": "embedding"}, {"words"}),
    "attention": ({"targets": "attention"}, ATTENTION),
    "all": ({"targets": "all"}, LINEAR | DEPTHWISE | ATTENTION | {"stem", "down"}),
    "glob": ({"targets": "stages.*"}, {n for n in LINEAR | DEPTHWISE if n.startswith("stages.")}),
    "glob_in_the_middle": ({"targets": "stages.1.*.fc1"}, {"stages.1.0.fc1", "stages.1.1.fc1"}),
    "suffix": ({"targets": "fc1"}, {f"{b}.fc1" for b in BLOCKS}),
    "dotted_suffix": ({"targets": "0.fc2"}, {"stages.0.0.fc2", "stages.1.0.fc2"}),
    "prefix_of_another_name": ({"targets": "stages.0.0.fc1"}, {"stages.0.0.fc1"}),
    "character_class": ({"targets": "fc[12]"}, {f"{b}.fc{n}" for b in BLOCKS for n in (1, 2)}),
    "regex": (
        {"targets": r"re:stages\.\d\.1\.fc\d"},
        {f"stages.{s}.1.fc{n}" for s in (0, 1) for n in (1, 2)},
    ),
    "regex_is_a_full_match": ({"targets": "re:down"}, {"down"}),
    "type": ({"targets": nn.Conv2d}, DEPTHWISE | {"stem", "down", "pointwise"}),
    "list": ({"targets": ["stem", nn.Embedding, "re:down"]}, {"stem", "words", "down"}),
    "raw": ({"targets": "table"}, {"table"}),
    "exclude": ({"targets": "all", "exclude": ["stem", "attention", "*.dw"]}, LINEAR | {"down"}),
    "exclude_type": (
        {"targets": "all", "exclude": [nn.Linear, "attention"]},
        {"stem", "down", "pointwise"} | DEPTHWISE,
    ),
    "exclude_one_of_prefixes": (
        {"targets": "stages.0.0.*", "exclude": "fc1"},
        {f"stages.0.0.{n}" for n in ("dw", "fc10", "fc2")},
    ),
    "excluded_head": ({"targets": "linear", "exclude": "head"}, LINEAR),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selection(selection: str) -> None:
    options, expected = SELECTIONS[selection]
    model = Tower()
    report = inject(model, FLoRA(rank=2, **options))
    names = {name.removesuffix(".weight") for name in deltas(model)}
    assert names == expected
    assert len(report.rows) == len(expected)
    assert {
        f"{row.layer}.{row.param}".strip(".").removesuffix(".weight") for row in report.rows
    } == expected


MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "typo": ({"targets": "stages.0.0.fc3"}, r"(?s)fc3.*stages\.0\.0\.fc"),
    "one_of_two": ({"targets": ["linear", "dwconv"]}, "(?s)dwconv.*dw"),
    "keyword": ({"targets": "linaer"}, "linaer"),
    "keyword_without_such_layers": ({"targets": ["linear", nn.Conv3d]}, "Conv3d"),
    "regex": ({"targets": r"re:stages\.9.*"}, r"stages.+9"),
    "bad_regex": ({"targets": "re:stages(("}, r"(?i)stages\(\("),
    "number": ({"targets": 5}, "not 5"),
    "two_in_one": ({"targets": "depthwise,linear"}, r"list, \[depthwise,linear\]"),
    "half_a_name": ({"targets": "tages.0.0.fc1"}, "tages"),
    "head": ({"targets": "head"}, "head"),
    "trained": ({"targets": ["stem", "down"], "_train": ["down"]}, "down"),
    "one_dimension": ({"targets": "scale"}, "scale"),
    "bias": ({"targets": "stem.bias"}, "stem.bias"),
    "empty": ({"targets": []}, "targets"),
    "exclude": ({"targets": "linear", "exclude": ["fc1", "fc3"]}, "fc3"),
    "exclude_all": ({"targets": "fc1", "exclude": "fc1"}, "fc1"),
    "rank_pattern": ({"targets": "linear", "rank_pattern": {"fc3": 2}}, "(?s)rank_pattern.*fc3"),
    "rank_pattern_outside_targets": (
        {"targets": "linear", "rank_pattern": {"stem": 2}},
        "(?s)rank_pattern.*stem",
    ),
    "scale_pattern": (
        {"targets": "linear", "scale_pattern": {"fc3": 2.0}},
        "(?s)scale_pattern.*fc3",
    ),
    "modes": ({"targets": "stem", "rank_pattern": {"stem": [1, 2]}}, r"(?s)stem.*4.*2"),
    "spatial_modes": ({"targets": "stem", "spatial_rank": [1, 2, 3]}, r"(?s)stem.*2.*3"),
    "parts": ({"targets": "linear", "parts": {"fc3": None}}, "(?s)parts.*fc3"),
}


@pytest.mark.parametrize("miss", MISSES)
def test_what_matches_nothing_raises(miss: str) -> None:
    options, message = MISSES[miss]
    options = dict(options)
    train = options.pop("_train", ())
    model = Tower()
    with unchanged(model), pytest.raises(AdapterError, match=message) as error:
        inject(model, FLoRA(**options), train=train)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("train", ["haed", ["head", "nrom"]], ids=str)
def test_unmatched_train_raises(train: Any) -> None:
    model = Tower()
    with unchanged(model), pytest.raises(AdapterError, match=r"(?s)haed.*head|nrom"):
        inject(model, FLoRA(), train=train)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"rank": -1},
        {"rank": 2.5},
        {"rank": "8"},
        {"rank": True},
        {"spatial_rank": 0},
        {"spatial_rank": [2, 0]},
        {"init": "kaiming"},
        {"path": "fast"},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"scale": float("nan")},
        {"rank_pattern": {"fc1": 0}},
        {"scale_pattern": {"fc1": float("inf")}},
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items()),
)
def test_impossible_settings_raise(settings: dict[str, Any]) -> None:
    model = Tower()
    with unchanged(model), pytest.raises(AdapterError, match=next(iter(settings)).split("_p")[0]):
        inject(model, FLoRA(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"alpha": float("inf")},
        {"conv": "typo"},
        {"alpha_pattern": {"fc1": float("nan")}},
    ],
    ids=str,
)
def test_impossible_settings_of_lora_raise(settings: dict[str, Any]) -> None:
    model = Tower()
    with unchanged(model), pytest.raises(AdapterError, match=next(iter(settings)).split("_p")[0]):
        inject(model, LoRA(**settings))


def test_other_things_than_a_tuning_are_refused() -> None:
    model = Tower()
    for wrong in (FLoRA, "flora", None, {"rank": 8}):
        with unchanged(model), pytest.raises(AdapterError, match="FLoRA"):
            inject(model, wrong)  # type: ignore[arg-type]


def test_patterns_set_each_layer() -> None:
    model = Tower()
    inject(
        model,
        FLoRA(
            rank=4,
            targets=["linear", "conv"],
            rank_pattern={"stages.0.*": 2, "fc1": 3, "stem": [5, 2, 1, 4]},
            scale_pattern={"stages.1.*": 0.5},
        ),
    )
    by_name = deltas(model)
    assert by_name["stages.0.0.fc1.weight"].core.shape == (2, 2), "the first pattern that fits wins"
    assert by_name["stages.1.0.fc1.weight"].core.shape == (3, 3)
    assert by_name["stages.1.0.fc10.weight"].core.shape == (4, 4), "fc1 is not fc10"
    assert by_name["stem.weight"].core.shape == (5, 2, 1, 4)
    assert by_name["down.weight"].core.shape == (4, 4, 2, 2)
    assert by_name["stages.1.1.fc2.weight"].scale == 0.5
    assert by_name["stages.0.1.fc2.weight"].scale == 1.0


def test_scales_of_lora() -> None:
    model = Tower()
    inject(
        model,
        LoRA(
            rank=4, alpha=8, targets="linear", rank_pattern={"fc1": 2}, alpha_pattern={"fc2": 2.0}
        ),
    )
    by_name = deltas(model)
    assert by_name["stages.0.0.fc1.weight"].scale == 4.0
    assert by_name["stages.0.0.fc2.weight"].scale == 0.5
    assert by_name["stages.0.0.fc10.weight"].scale == 2.0
    stabilised = Tower()
    inject(stabilised, LoRA(rank=4, alpha=8, targets="linear", rank_stabilized=True))
    assert deltas(stabilised)["stages.0.0.fc1.weight"].scale == 4.0


@pytest.mark.parametrize("name", ["head", "heads", "fc", "classifier", "lm_head"])
def test_the_head_is_never_adapted(name: str) -> None:
    model = nn.Sequential()
    model.add_module("body", nn.Linear(4, 4))
    model.add_module(name, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    inject(model, FLoRA(rank=2, targets="all"), train=[name])
    assert set(deltas(model)) == {"body.weight"}
    assert all(p.requires_grad for p in getattr(model, name).parameters())


def test_get_classifier_says_what_the_head_is() -> None:
    class Timm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.last = nn.Linear(4, 2)

        def get_classifier(self) -> nn.Module:
            return self.last

    model = Timm()
    inject(model, FLoRA(rank=2))
    assert set(deltas(model)) == {"fc.weight"}


def test_default_targets_say_what_they_pass_over() -> None:
    net = timm.create_model("resnet18")
    told = "convolutions beyond 1x1 are not adapted: targets='all'"
    assert any(told in w for w in inject(net, FLoRA(rank=2)).warnings)
    everything = inject(timm.create_model("resnet18"), FLoRA(rank=2, targets="all"))
    assert not any(told in w for w in everything.warnings)

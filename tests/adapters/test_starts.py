"""LoRA that begins from the weight: PEFT's PiSSA and OLoRA on a base that stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from litflora.adapters import AdapterError, LoRA, OLoRA, Parts, PiSSA, inject, load, save
from litflora.adapters.folder import WEIGHTS
from litflora.adapters.starts import PiSSADelta

from .cases import BY_ID, METHODS, assert_close, deltas, gradients, randomize, relative_error
from .test_peft_format import TOKENS, vision, words
from .toys import images, unchanged

KINDS = {"pissa": PiSSA, "olora": OLoRA}
started = pytest.mark.parametrize("kind", KINDS)


def layers() -> nn.Sequential:
    """Single precision, which PEFT's starts are made in."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4))


@started
def test_outputs_and_gradients_are_those_of_peft(kind: str) -> None:
    """PEFT's base is W - s B0 A0; the signs of singular vectors are copied from it."""
    peft = pytest.importorskip("peft")
    ours, base = layers(), layers()
    inject(ours, KINDS[kind](rank=3, alpha=5.0, targets=["0", "2"]))
    settings = {"r": 3, "lora_alpha": 5.0, "target_modules": ["0", "2"]}
    theirs = peft.get_peft_model(layers(), peft.LoraConfig(init_lora_weights=kind, **settings))
    held, copied = [], []
    for name, delta in deltas(ours).items():
        layer = theirs.base_model.model.get_submodule(name.removesuffix(".weight"))
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert_close(delta.lora_B @ delta.lora_A, B @ A, 1e-5, f"{name} at the start")
        held += [delta.lora_A, delta.lora_B]
        copied += [A, B]
        with torch.no_grad():
            for own, start, value in ((held[-2], delta.start_A, A), (held[-1], delta.start_B, B)):
                step = 0.3 * torch.randn_like(value)
                start.copy_(value)
                own.copy_(value.add_(step))
    x = torch.randn(7, 6)
    y, expected = ours(x), theirs(x)
    assert relative_error(base(x), expected) > 1e-2
    assert_close(y, expected, 1e-5)
    for got, want in zip(gradients(y, held), gradients(expected, copied), strict=True):
        assert_close(got, want, 1e-5, f"gradient of {tuple(want.shape)}")


MATRICES = ("linear", "conv2d-groups", "conv_transpose2d", "embedding", "attention-fused", "raw-2d")


@pytest.mark.parametrize("case", MATRICES)
@started
def test_the_start_is_the_decomposition_of_the_unfolded_weight(kind: str, case: str) -> None:
    model = BY_ID[case].model()
    inject(model, METHODS[kind](targets=BY_ID[case].target))
    for name, delta in deltas(model).items():
        out, r = delta.info.out_dim, delta.rank
        weight = model.get_parameter(name).detach().movedim(out, 0).flatten(1)
        A, B = delta.start_A.flatten(1), delta.start_B
        assert torch.equal(delta.lora_A, delta.start_A)
        assert torch.equal(delta.lora_B, delta.start_B)
        if kind == "pissa":  # the nearest matrix of rank r, halved between the two
            u, values, v = torch.linalg.svd(weight, full_matrices=False)
            nearest = u[:, :r] * values[:r] @ v[:r]
            assert_close(delta.scale * B @ A, nearest, 1e-12, name)
            assert_close(B.T @ B, A @ A.T, 1e-12, name)
        else:  # orthonormal columns, which span the first r of the weight
            assert_close(B.T @ B, torch.eye(r, dtype=torch.float64), 1e-12, name)
            assert_close(B @ A, B @ B.T @ weight, 1e-12, name)
            assert_close((B @ A)[:, :r], weight[:, :r], 1e-12, name)


@started
def test_parts_of_a_fused_weight_begin_from_their_own_rows(kind: str) -> None:
    fused, alone = nn.Sequential(nn.Linear(6, 12)).double(), nn.Sequential(nn.Linear(6, 4)).double()
    alone[0].weight.data = fused[0].weight.data[8:]
    inject(alone, METHODS[kind](targets="0"))
    inject(fused, METHODS[kind](targets="0", parts={"0": Parts(3, [2])}))
    (part,) = deltas(fused)["0.weight"].parts.values()
    for name, value in deltas(alone)["0.weight"].state_dict().items():
        assert torch.equal(part.state_dict()[name], value), name


# Files --------------------------------------------------------------------------------------------


@started
def test_a_folder_brings_its_start_along(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = vision(), images()
    inject(model, METHODS[kind](targets=["stem", "mlp.*"], rank_stabilized=True, lr_ratio=4.0))
    randomize(model)
    save(model, tmp_path)
    for decompose in ("svd", "qr"):
        monkeypatch.setattr(f"torch.linalg.{decompose}", None)
    again = vision()
    load(again, tmp_path)
    assert torch.equal(again(x), model(x))
    held = {key.rpartition(".")[2] for key in load_file(tmp_path / WEIGHTS) if "adapters" in key}
    assert held == {"lora_A", "lora_B", "start_A", "start_B"}
    for name, delta in deltas(again).items():
        assert delta.settings() == deltas(model)[name].settings()
        assert delta.rates() == {"lora_B": 4.0}


@pytest.mark.parametrize(
    ("build", "x", "targets"),
    [(vision, images(), ["stem", "mlp.*"]), (words, TOKENS, ["embed", "conv", "dense"])],
    ids=["vision", "words"],
)
@started
def test_peft_reads_it_as_lora_of_twice_the_rank_on_the_original_base(
    kind: str, build: Any, x: Tensor, targets: list[str], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    ours = build()
    inject(ours, METHODS[kind](targets=targets))
    randomize(ours)
    save(ours, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    assert theirs.peft_config["default"].r == 4
    expected = ours(x).detach()
    assert relative_error(build()(x).detach(), expected) > 1e-2
    assert_close(theirs(x).detach(), expected, 1e-12)


@pytest.mark.parametrize("rank", [2, 9])
def test_rank_stabilised_scales_are_those_of_peft(rank: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours = layers()
    inject(ours, LoRA(rank=rank, alpha=5.0, rank_stabilized=True, targets="0"))
    settings = {"r": rank, "lora_alpha": 5.0, "target_modules": ["0"], "use_rslora": True}
    theirs = peft.get_peft_model(layers(), peft.LoraConfig(**settings)).base_model.model
    expected = theirs.get_submodule("0").scaling["default"]
    assert deltas(ours)["0.weight"].scale == expected == 5.0 / rank**0.5
    save(ours, tmp_path)
    load(again := layers(), tmp_path)
    assert deltas(again)["0.weight"].scale == expected


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "options", "told"),
    [
        ("raw-3d-experts", {}, r"layer\.gate_up has shape \[3, 6, 8\]: exclude it"),
        ("conv2d", {"conv": "loralib"}, r"layer\.weight .* take conv='peft'"),
    ],
)
@started
def test_what_is_no_matrix_is_refused(
    kind: str, case: str, options: dict[str, Any], told: str
) -> None:
    model = BY_ID[case].model()
    with unchanged(model), pytest.raises(AdapterError, match=f"{KINDS[kind].__name__} .*{told}"):
        inject(model, KINDS[kind](rank=2, targets=BY_ID[case].target, **options))


def test_values_that_give_no_start_are_refused() -> None:
    with pytest.raises(AdapterError, match="PiSSA divides by the scale: alpha must not be 0"):
        PiSSA(alpha_pattern={"0": 0.0})
    model = layers()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with unchanged(model), pytest.raises(AdapterError, match=r"2\.weight holds a NaN"):
        inject(model, PiSSA(targets=["0", "2"]))
    empty = layers().to("meta")
    with pytest.raises(AdapterError, match=r"0\.weight: PiSSA begins from"):
        inject(empty, PiSSA(targets="0"), device=torch.device("cpu"))


def test_a_negative_scale_begins_from_the_same_part_of_the_weight() -> None:
    found = []
    for alpha in (3.0, -3.0):
        model = layers()
        inject(model, PiSSA(rank=2, alpha=alpha, targets="0"))
        delta = deltas(model)["0.weight"]
        assert isinstance(delta, PiSSADelta)
        found.append(delta.scale * delta.start_B @ delta.start_A)
    assert_close(found[1], found[0], 1e-5)

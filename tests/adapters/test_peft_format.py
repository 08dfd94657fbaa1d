"""PEFT's and LyCORIS's files, and the settings at which FLoRA is one of its ancestors."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from litflora.adapters import AdapterError, FLoRA, Full, LoRA, inject, load, save

from .cases import assert_close, deltas, randomize, relative_error
from .toys import Net, images, net, unchanged


class Words(nn.Module):
    """An embedding, a convolution over it and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1, stride=2)
        self.dense = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.embed(x).transpose(1, 2)).transpose(1, 2)
        return self.head(F.gelu(self.dense(h)).mean(1))


def words() -> Words:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Words().double().eval()


def vision() -> Net:
    model = net()
    model.stem.padding_mode = "zeros"  # the one that peft gets right
    return model


TOKENS = torch.arange(10).reshape(2, 5)

PEFT_CONFIGS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]] = {
    "linear": (vision, images(), {"target_modules": ["mlp.0", "mlp.2"]}),
    "conv2d": (vision, images(), {"target_modules": ["stem", "mlp.0"]}),
    "regex": (vision, images(), {"target_modules": r"mlp\.[02]"}),
    "embedding+conv1d+linear": (words, TOKENS, {"target_modules": ["embed", "conv", "dense"]}),
    "rslora": (vision, images(), {"target_modules": ["stem", "mlp.0"], "use_rslora": True}),
    "patterns": (
        vision,
        images(),
        {
            "target_modules": ["stem", "mlp.0", "mlp.2"],
            "rank_pattern": {"mlp.0": 2, "stem": 5},
            "alpha_pattern": {"mlp.2": 9},
        },
    ),
    "head": (vision, images(), {"target_modules": ["mlp.0"], "modules_to_save": ["head"]}),
}


@pytest.mark.parametrize("config", PEFT_CONFIGS)
def test_reads_what_peft_writes(config: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    build, x, options = PEFT_CONFIGS[config]
    theirs = peft.get_peft_model(
        build(), peft.LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, **options)
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.4)
                assert "lora" in name or "modules_to_save" in name
    theirs.save_pretrained(tmp_path)
    ours = build()
    load(ours, tmp_path)
    expected = theirs(x).detach()
    assert relative_error(build()(x).detach(), expected) > 1e-2
    assert_close(ours(x).detach(), expected, 1e-12)


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize(
    ("build", "x", "targets"),
    [(vision, images(), ["stem", "mlp.*"]), (words, TOKENS, ["embed", "conv", "dense"])],
    ids=["vision", "words"],
)
def test_peft_reads_what_we_write(
    build: Callable[[], nn.Module],
    x: Tensor,
    targets: list[str],
    rank_stabilized: bool,
    tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft")
    ours = build()
    pattern = {targets[0]: 2}
    inject(
        ours,
        LoRA(
            rank=3, alpha=7, targets=targets, rank_stabilized=rank_stabilized, rank_pattern=pattern
        ),
    )
    randomize(ours)
    save(ours, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    expected = ours(x).detach()
    assert relative_error(build()(x).detach(), expected) > 1e-2
    assert_close(theirs(x).detach(), expected, 1e-12)
    again = build()
    load(again, tmp_path)
    assert torch.equal(again(x), ours(x)), "and so do we"


def test_a_trained_head_is_written_for_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours = vision()
    inject(ours, LoRA(rank=3, targets="mlp.*"), train=["head"])
    randomize(ours)
    nn.init.normal_(ours.head.weight)
    save(ours, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(vision(), tmp_path).eval()
    assert_close(theirs(images()).detach(), ours(images()).detach(), 1e-12)


@pytest.mark.parametrize(
    "tuning",
    [FLoRA(targets="mlp.*"), LoRA(targets="stem", conv="loralib")],
    ids=["flora", "loralib"],
)
def test_what_peft_cannot_hold_is_not_written(tuning: Any, tmp_path: Path) -> None:
    model = vision()
    inject(model, tuning)
    with pytest.raises(AdapterError, match=r"(?i)peft"):
        save(model, tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize(
    ("layer", "left_out"),
    [
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(3, 4, 3, dilation=2), r"dilation=\(2, 2\)"),
        (nn.ConvTranspose2d(3, 4, 3), "that the convolution is transposed"),
    ],
    ids=["reflect", "dilation", "transposed"],
)
def test_what_peft_would_compute_otherwise_is_not_exchanged(
    layer: nn.Module, left_out: str, tmp_path: Path
) -> None:
    model, base = nn.Sequential(deepcopy(layer)), nn.Sequential(layer)
    inject(model, LoRA(rank=2, targets="all"))
    with pytest.raises(AdapterError, match=left_out):
        save(model, tmp_path / "a", format="peft")
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    inject(plain, LoRA(rank=2, targets="all"))
    save(plain, tmp_path / "b", format="peft")
    with unchanged(base), pytest.raises(AdapterError, match=left_out):
        load(base, tmp_path / "b")


def test_peft_leaves_the_padding_row_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours, base = (nn.Sequential(nn.Embedding(5, 4, padding_idx=2)) for _ in range(2))
    base.load_state_dict(ours.state_dict())
    inject(ours, LoRA(rank=2, targets="0"))
    randomize(ours)
    save(ours, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    tokens = torch.arange(5)
    assert_close(theirs(tokens).detach(), ours(tokens).detach(), 1e-6)


def test_full_tuning_is_no_folder_of_peft(tmp_path: Path) -> None:
    model = vision()
    inject(model, Full())
    with pytest.raises(AdapterError, match="there is none: merge"):
        save(model, tmp_path / "a", format="peft")


@pytest.mark.parametrize(
    "options",
    [{"bias": "all"}, {"lora_bias": True}],
    ids=lambda options: next(iter(options)),
)
def test_what_we_cannot_read_of_peft_is_refused_by_name(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Reading it as plain LoRA would give a model that is wrong without a word."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        vision(), peft.LoraConfig(r=2, target_modules=["mlp.0"], **options)
    )
    theirs.save_pretrained(tmp_path)
    model = vision()
    with unchanged(model), pytest.raises(AdapterError, match=next(iter(options))):
        load(model, tmp_path)


def test_damaged_peft_folders(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(vision(), peft.LoraConfig(r=2, target_modules=["mlp.0", "mlp.2"]))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    good = load_file(path)
    some = next(iter(good))
    for bad in (
        {key: value for key, value in good.items() if key != some},
        {**good, some.replace("mlp.", "mlp.9"): good[some]},
        {**good, some: good[some][:1]},
    ):
        save_file({key: value.clone() for key, value in bad.items()}, path, {"format": "pt"})
        model = vision()
        with unchanged(model), pytest.raises(AdapterError, match="mlp"):
            load(model, tmp_path)


# LyCORIS ----------------------------------------------------------------------------------------


def locon(
    shape: tuple[int, ...], rank: int, tucker: bool, alpha: float
) -> tuple[dict[str, Tensor], Tensor]:
    """A LoCon's tensors as LyCORIS stores them, and the dW that they mean."""
    out, inner, *kernel = shape
    up = torch.randn(out, rank, *[1] * len(kernel), dtype=torch.float64)
    tensors = {"lora_up.weight": up, "alpha": torch.tensor(alpha, dtype=torch.float64)}
    if tucker:
        down = torch.randn(rank, inner, *[1] * len(kernel), dtype=torch.float64)
        middle = torch.randn(rank, rank, *kernel, dtype=torch.float64)
        tensors |= {"lora_down.weight": down, "lora_mid.weight": middle}
        dense = torch.einsum("or,rs...,si->oi...", up.flatten(1), middle, down.flatten(1))
    else:
        down = torch.randn(rank, inner, *kernel, dtype=torch.float64)
        tensors["lora_down.weight"] = down
        dense = torch.einsum("or,r...->o...", up.flatten(1), down)
    return tensors, alpha / rank * dense


@pytest.mark.parametrize("tucker", [False, True], ids=["plain", "tucker"])
def test_reads_lycoris_files_by_their_format(tucker: bool, tmp_path: Path) -> None:
    base, tensors, expected = vision(), {}, {}
    for name, kernel in [("stem", tucker), ("mlp.0", False), ("dw", False)]:
        shape = tuple(base.get_submodule(name).weight.shape)
        part, expected[f"{name}.weight"] = locon(shape, 3 if name != "dw" else 1, kernel, 2.0)
        tensors |= {f"lycoris_{name.replace('.', '_')}.{key}": value for key, value in part.items()}
    save_file(tensors, tmp_path / "locon.safetensors")
    model = vision()
    load(model, tmp_path / "locon.safetensors")
    assert deltas(model).keys() == expected.keys()
    for parameter, delta in deltas(model).items():
        assert_close(delta.dense(), expected[parameter], 1e-12, parameter)


@pytest.mark.parametrize("tucker", [False, True], ids=["plain", "tucker"])
def test_reads_what_lycoris_writes(tucker: bool, tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris")
    base = vision().float()
    lycoris.LycorisNetwork.apply_preset(
        {"target_name": ["stem", "mlp.0", "mlp.2"], "target_module": []}
    )
    theirs = deepcopy(base)
    wrapper = lycoris.create_lycoris(
        theirs,
        1.0,
        linear_dim=3,
        linear_alpha=2.0,
        conv_dim=3,
        conv_alpha=2.0,
        algo="locon",
        use_tucker=tucker,
    )
    wrapper.apply_to()
    assert len(wrapper.loras) == 3
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter.normal_(std=0.3)
    x = images(dtype=torch.float32)
    expected = theirs.eval()(x).detach()
    wrapper.save_weights(str(tmp_path / "locon.safetensors"), torch.float32, {})
    ours = vision().float()
    load(ours, tmp_path / "locon.safetensors")
    assert relative_error(base.eval()(x).detach(), expected) > 1e-2
    assert_close(ours(x).detach(), expected, 1e-5)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("lycoris_mlp_0.lora_up.weight"), "mlp"),
        (lambda t: t.update({"lycoris_mlp_0.hada_w1_a": torch.ones(2, 2)}), "hada_w1_a"),
        (lambda t: t.update({"lycoris_mlp_0.dora_scale": torch.ones(2)}), "dora_scale"),
        (lambda t: t.update({"lycoris_typo.lora_up.weight": torch.ones(2, 2)}), "typo"),
        (lambda t: t.update({"lycoris_mlp_0.lora_down.weight": torch.ones(3, 99)}), "(?s)mlp.*99"),
    ],
    ids=["missing", "loha", "dora", "unknown_layer", "shape"],
)
def test_lycoris_files_we_cannot_read(
    edit: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    tensors, _ = locon((12, 8), 3, False, 2.0)
    named = {f"lycoris_mlp_0.{key}": value for key, value in tensors.items()}
    edit(named)
    save_file(named, tmp_path / "f.safetensors")
    model = vision()
    with unchanged(model), pytest.raises(AdapterError, match=message):
        load(model, tmp_path / "f.safetensors")


def test_flattened_names_that_mean_two_layers_are_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.add_module("a", nn.Module())
    model.a.add_module("b_c", nn.Linear(8, 12))
    model.add_module("a_b", nn.Module())
    model.a_b.add_module("c", nn.Linear(8, 12))
    tensors, _ = locon((12, 8), 3, False, 2.0)
    save_file(
        {f"lycoris_a_b_c.{key}": value for key, value in tensors.items()},
        tmp_path / "f.safetensors",
    )
    with unchanged(model), pytest.raises(AdapterError, match=r"(?s)a\.b_c.*a_b\.c"):
        load(model, tmp_path / "f.safetensors")


# FLoRA's ancestors ------------------------------------------------------------------------------


def flora(layer: nn.Module, rank: int | list[int], **options: Any) -> Any:
    """The delta of a FLoRA on one layer, with the ranks given."""
    model = nn.Sequential(layer.double())
    inject(model, FLoRA(targets="0", rank_pattern={"0": rank}, **options))
    return randomize(model), deltas(model)["0.weight"]


@torch.no_grad()
def test_flora_with_the_identity_for_core_is_lora() -> None:
    model, delta = flora(nn.Linear(6, 9), 3)
    delta.core.copy_(torch.eye(3))
    lora = nn.Sequential(deepcopy(model[0]))
    lora = nn.Sequential(nn.Linear(6, 9).double())
    lora[0].load_state_dict({k: v for k, v in model[0].state_dict().items() if "adapters" not in k})
    inject(lora, LoRA(rank=3, alpha=3.0, targets="0"))
    other = deltas(lora)["0.weight"]
    other.lora_B.copy_(delta.factors["0"])
    other.lora_A.copy_(delta.factors["1"].T)
    assert_close(delta.dense(), other.dense(), 1e-14)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert_close(model(x), lora(x), 1e-14)


@torch.no_grad()
def test_flora_with_a_superdiagonal_core_is_cp() -> None:
    _, delta = flora(nn.Conv2d(5, 7, (3, 4)), [3, 3, 3, 3])
    delta.core.zero_()
    weights = torch.randn(3, dtype=torch.float64)
    for n in range(3):
        delta.core[n, n, n, n] = weights[n]
    cp = torch.einsum("r,or,ir,yr,xr->oiyx", weights, *(delta.factors[str(n)] for n in range(4)))
    assert_close(delta.dense(), cp, 1e-14)


@torch.no_grad()
def test_flora_with_identity_kernel_factors_is_locon_tucker() -> None:
    _, delta = flora(nn.Conv2d(5, 7, (3, 2)), [4, 4, 3, 2], scale=0.5)
    delta.factors["2"].copy_(torch.eye(3)), delta.factors["3"].copy_(torch.eye(2))
    up, down = delta.factors["0"], delta.factors["1"].T
    locon_tucker = torch.einsum("or,rsyx,si->oiyx", up, delta.core, down)
    assert_close(delta.dense(), 0.5 * locon_tucker, 1e-14)


@torch.no_grad()
def test_flora_with_identities_for_input_and_kernel_is_pefts_conv_lora() -> None:
    _, delta = flora(nn.Conv2d(5, 7, 3), [4, 5, 3, 3])
    for mode in ("1", "2", "3"):
        delta.factors[mode].copy_(torch.eye(delta.factors[mode].shape[0]))
    lora = nn.Sequential(nn.Conv2d(5, 7, 3).double())
    inject(lora, LoRA(rank=4, alpha=4.0, targets="0"))
    other = deltas(lora)["0.weight"]
    other.lora_A.copy_(delta.core), other.lora_B.copy_(delta.factors["0"])
    assert_close(delta.dense(), other.dense(), 1e-14)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 5),
        nn.Conv2d(6, 6, (7, 3), groups=6),
        nn.ConvTranspose3d(4, 6, (2, 3, 1)),
        nn.Embedding(7, 6),
    ],
    ids=["conv1d", "depthwise", "transpose3d", "embedding"],
)
def test_flora_is_the_tucker_form_of_the_stored_shape(layer: nn.Module) -> None:
    """dW[i1..iN] = s * sum G[j1..jN] A1[i1,j1] ... AN[iN,jN], spelt out."""
    _, delta = flora(layer, 3, spatial_rank=2, scale=0.3)
    shape = layer.weight.shape
    dense = delta.core
    letters = "abcde"[: dense.dim()]
    for n, size in enumerate(shape):
        factor = delta.factors[str(n)] if str(n) in delta.factors else torch.ones(1, 1).double()
        assert tuple(factor.shape) == (size, delta.core.shape[n])
        assert (size > 1) == (str(n) in delta.factors), "a mode of size 1 carries no factor"
        out = letters[:n] + "z" + letters[n + 1 :]
        dense = torch.einsum(f"{letters},z{letters[n]}->{out}", dense, factor)
    assert_close(delta.dense(), 0.3 * dense, 1e-14)


@pytest.mark.parametrize("conv", ["peft", "loralib"])
def test_lora_on_a_convolution_is_the_one_named(conv: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).double()
    inject(model, LoRA(rank=2, alpha=5.0, targets="0", conv=conv))  # type: ignore[arg-type]
    randomize(model)
    delta = deltas(model)["0.weight"]
    if conv == "peft":
        expected = torch.einsum("or,riyx->oiyx", delta.lora_B, delta.lora_A)
    else:
        expected = (delta.lora_B @ delta.lora_A).view(6, 4, 3, 3)
    assert_close(delta.dense(), 2.5 * expected, 1e-14)

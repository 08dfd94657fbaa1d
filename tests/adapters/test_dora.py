"""DoRA: what it computes, from the definition and from PEFT, and what it leaves alone."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from litflora.adapters import (
    AdapterError,
    DoRA,
    LoRA,
    Parts,
    PerModule,
    activate,
    inject,
    load,
    merge,
    save,
)

from .cases import (
    BY_ID,
    Case,
    adapt,
    assert_close,
    assert_gradients_close,
    deltas,
    differentiable,
    factors,
    gradients,
    randomize,
    relative_error,
    table,
    with_deltas,
)
from .toys import images, net, saved_bytes, unchanged


def as_defined(delta: Any, base: Tensor, scale: float) -> Tensor:
    """``W' = m * V / ||V||`` with ``V = W0 + s B A``, output by output, the norm a constant."""
    out = delta.info.out_dim
    rows = []
    for n, row in enumerate(base.unbind(out)):
        moved = row + scale * torch.einsum("r,r...->...", delta.lora_B[n], delta.lora_A)
        rows.append(delta.magnitude[n] * moved / moved.detach().square().sum().sqrt())
    return torch.stack(rows, out)


@table(
    [
        "linear",
        "conv1d-groups-circular",
        "conv2d-groups",
        "conv2d-depthwise7",
        "conv3d-asymmetric",
        "conv_transpose1d-groups",
        "conv_transpose2d",
        "embedding",
        "attention-split",
        "raw-2d",
    ],
    ["dora"],
    path=False,
)
def test_value_and_gradients_are_those_of_the_definition(
    case: Case, method: str, path: str
) -> None:
    model, base = adapt(case, method, path)
    inputs, leaves = differentiable(case.inputs())
    changed = {
        name: as_defined(delta, base.get_parameter(name), scale=3.0 / 2)
        for name, delta in deltas(model).items()
    }
    expected = functional_call(base, changed, inputs)
    y = model(*inputs)
    assert relative_error(base(*inputs), expected) > 1e-2
    assert_close(y, expected, 1e-10)
    assert_gradients_close(y, expected, [*leaves, *factors(model)])


def test_parts_of_a_fused_weight_have_norms_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(6, 12)).double()
    base = deepcopy(model)
    inject(model, DoRA(rank=2, alpha=4.0, targets="0", parts={"0": Parts(of=3, adapt=[0, 2])}))
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(model(x), base.requires_grad_(False)(x)), "the start"
    randomize(model)
    q, k, v = base[0].weight.chunk(3)
    (first, second) = deltas(model)["0.weight"].parts.values()
    changed = torch.cat([as_defined(first, q, 2.0), k, as_defined(second, v, 2.0)])
    assert_close(model(x), F.linear(x, changed, base[0].bias), 1e-12)
    kept = model[0].adapters.cache._kept
    with torch.no_grad():
        model.eval()(x)
        made = kept["weight"].value
        model(x)
    assert kept["weight"].value is made, "made anew for each call"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_start_on_a_base_in_half_precision_is_the_base(dtype: torch.dtype) -> None:
    model, base = adapt(BY_ID["linear"], "dora", dtype=dtype, random=False)
    (x,) = BY_ID["linear"].inputs(dtype)
    assert torch.equal(model(x), base.requires_grad_(False)(x))


def test_an_output_that_is_zero_can_learn() -> None:
    """Its norm is 0, by which W' would be divided: a layer may start with zeros on purpose."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    nn.init.zeros_(model[0].weight[1])
    inject(model, DoRA(rank=2, targets="0"))
    x, target = torch.randn(8, 4).double(), torch.randn(8, 3).double()
    start = model(x).detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - target).square().sum().backward()
        optimizer.step()
    after = model(x)
    assert after.isfinite().all()
    assert not torch.equal(after[:, 1], start[:, 1])


def test_a_merged_adapter_does_not_change_the_base_of_another() -> None:
    model = net()
    base = deepcopy(model)
    inject(model, LoRA(rank=2, targets="mlp.*"), name="lora")
    inject(model, DoRA(rank=2, targets="mlp.*"), name="dora")
    randomize(model, name="lora"), randomize(model, name="dora")
    weights = {"lora": 1.0, "dora": 0.5}
    activate(model, weights)
    expected = with_deltas(base, model, images(), weights=weights)
    assert_close(model(images()), expected, 1e-10)
    merge(model, "lora")
    assert_close(model(images()), expected, 1e-10, "one of two merged")


def test_a_copy_follows_its_own_base() -> None:
    model, _ = adapt(BY_ID["linear"], "dora")
    copied = deepcopy(model)
    with torch.no_grad():
        copied.layer.weight.normal_()
    own, theirs = (deltas(each)["layer.weight"] for each in (copied, model))
    assert_close(own.dense(), as_defined(own, copied.layer.weight, 1.5) - copied.layer.weight, 1e-9)
    assert relative_error(own.dense(), theirs.dense()) > 1e-2


def test_it_is_refused_where_the_base_is_read_later() -> None:
    model = nn.Sequential(nn.Linear(4, 3, device="meta"))
    with pytest.raises(AdapterError, match=r"0\.weight: DoRA begins from the base's values"):
        inject(model, DoRA(targets="0"), device=torch.device("cpu"))


@pytest.mark.parametrize("method", ["dora", "mora", "mora_rope", "loha", "lokr"])
def test_backward_keeps_no_matrix_of_the_bases_size(method: str) -> None:
    wide = Case("wide", lambda: nn.Linear(96, 128), lambda batch: (torch.randn(batch, 96),))
    model, _ = adapt(wide, method)
    assert saved_bytes(model, *wide.inputs()) < 96 * 128 * 8 / 2


@pytest.mark.parametrize("method", ["dora", "loha"])
def test_compiles_to_one_graph(method: str) -> None:
    torch._dynamo.reset()
    model, _ = adapt(BY_ID["linear"], method)
    (x,) = BY_ID["linear"].inputs()
    compiled, y = torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x)
    assert_close(compiled, y, 1e-12)
    assert_gradients_close(compiled, y, factors(model))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"conv": "loralib"}, "'peft' alone"),
        ({"dropout": 0.1}, r"layer\.weight has no side path, which dropout needs"),
        ({"path": "side"}, r"layer\.weight has no side path"),
        ({"rank_pattern": {"layer": [2, 2]}}, "DoRA has one rank"),
    ],
    ids=["conv", "dropout", "side", "ranks"],
)
def test_what_it_has_not_is_refused(options: dict[str, Any], told: str) -> None:
    model = BY_ID["linear"].model()
    with unchanged(model), pytest.raises(AdapterError, match=told):
        inject(model, DoRA(targets="layer", **options))


# PEFT -------------------------------------------------------------------------------------------


def peft_layers() -> dict[str, tuple[nn.Module, Tensor]]:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(9, 6)
    nn.init.normal_(conv1d.weight)
    return {
        "linear": (nn.Linear(6, 9), torch.randn(4, 6)),
        "conv1d": (nn.Conv1d(4, 6, 3, stride=2), torch.randn(2, 4, 9)),
        "conv2d": (nn.Conv2d(4, 6, (3, 2), padding=1), torch.randn(2, 4, 6, 5)),
        "conv3d": (nn.Conv3d(3, 4, 2), torch.randn(2, 3, 4, 3, 3)),
        "embedding": (nn.Embedding(11, 6), torch.arange(10).view(2, 5)),
        "transformers_conv1d": (conv1d, torch.randn(4, 6)),
    }


@pytest.mark.parametrize("kind", peft_layers())
def test_values_and_gradients_and_files_are_pefts(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    layer, x = peft_layers()[kind]
    base = nn.Sequential(layer).double()
    x = x.double() if x.is_floating_point() else x
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_dora=True,
        target_modules=["0"],
        fan_in_fan_out=kind == "transformers_conv1d",
    )
    theirs = peft.get_peft_model(deepcopy(base), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.4)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = deepcopy(base)
    load(ours, tmp_path / "theirs")
    expected, y = theirs(x), ours(x)
    assert relative_error(base(x), expected) > 1e-2
    assert_close(y, expected, 1e-10)
    order = {"lora_A": "A", "lora_embedding_A": "A", "lora_B": "B", "lora_embedding_B": "B"}
    named = {
        order.get(name.split(".default")[0].rpartition(".")[2], "magnitude"): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    delta = deltas(ours)["0.weight"]
    own = {"A": delta.lora_A, "B": delta.lora_B, "magnitude": delta.magnitude}
    got, want = gradients(y, list(own.values())), gradients(expected, [named[key] for key in own])
    for key, mine, other in zip(own, got, want, strict=True):
        assert_close(mine, other.reshape(mine.shape), 1e-10, key)

    save(ours, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "ours")
    assert_close(again(x), expected, 1e-10, "written for PEFT")


def test_peft_cannot_hold_dora_beside_lora(tmp_path: Path) -> None:
    model = net()
    inject(model, PerModule({"mlp.0": DoRA(rank=2), "mlp.2": LoRA(rank=2)}))
    with pytest.raises(AdapterError, match=r"mlp\.2\.weight: PEFT's DoRA format cannot hold"):
        save(model, tmp_path, format="peft")

"""How an adapted layer runs: inputs, memory layouts, dtypes, dropout, memory, compilation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from litflora.adapters import AdapterError, FLoRA, LoRA, inject, summary

from .cases import (
    BOTH,
    BY_ID,
    DENSE,
    DTYPES,
    FAMILIES,
    METHODS,
    PATHS,
    SQUARE,
    Case,
    Experts,
    Holder,
    adapt,
    assert_close,
    assert_gradients_close,
    deltas,
    differentiable,
    factors,
    gradients,
    randomize,
    reference64,
    relative_error,
    table,
    with_deltas,
)
from .toys import unchanged


@table(["linear", "conv2d", "conv2d-reflect", "conv2d-depthwise7", "conv_transpose2d"])
def test_unbatched_input(case: Case, method: str, path: str) -> None:
    model, base = adapt(case, method, path)
    (x,) = case.inputs()
    assert_close(model(x[0]), with_deltas(base, model, x[0]), 1e-10)


@table(FAMILIES)
def test_empty_batch(case: Case, method: str, path: str) -> None:
    model, base = adapt(case, method, path)
    inputs, leaves = differentiable(case.inputs(batch=0))
    try:
        expected = base(*inputs)
    except RuntimeError as error:
        pytest.skip(f"torch itself: {error}")
    y = model(*inputs)
    assert y.shape == expected.shape
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in factors(model))
    assert all(x.grad is not None for x in leaves)


@table(DENSE)
def test_views_as_input(case: Case, method: str, path: str) -> None:
    model, base = adapt(case, method, path)
    (x,) = case.inputs()
    views: dict[str, Tensor] = {
        "expanded": x[:1].expand(3, *x.shape[1:]),
        "transposed": x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "strided": x.repeat_interleave(2, 0)[::2],
    }
    for name, view in views.items():
        leaf = view.detach().requires_grad_()
        y, expected = model(leaf), with_deltas(base, model, leaf)
        assert_close(y, expected, 1e-10, name)
        assert_gradients_close(y, expected, [leaf, *factors(model)])


@pytest.mark.parametrize("weights_too", [False, True], ids=["input", "input_and_weight"])
@table(["conv2d", "conv2d-reflect", "conv2d-depthwise7", "conv2d-1x1", "conv2d-groups"])
def test_channels_last_stays(case: Case, method: str, path: str, weights_too: bool) -> None:
    model, base = adapt(case, method, path)
    (x,) = case.inputs()
    x = x.repeat(1, 1, 2, 2).contiguous(memory_format=torch.channels_last)
    if weights_too:
        model.to(memory_format=torch.channels_last), base.to(memory_format=torch.channels_last)
    for training in (True, False):
        model.train(training)
        y, expected = model(x), with_deltas(base, model, x)
        assert_close(y, expected, 1e-10)
        assert base(x).is_contiguous(memory_format=torch.channels_last)
        assert y.is_contiguous(memory_format=torch.channels_last), f"{training=}"


@pytest.mark.parametrize("path", ["side", "rebuilt"])
def test_few_inputs_are_exact_where_one_product_gives_two_gradients(path: str) -> None:
    base = Holder(nn.Linear(6, 20)).double()
    model = deepcopy(base)
    inject(model, FLoRA(rank=3, path=path, targets="layer"))
    randomize(model)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    y, expected = model(x), with_deltas(base, model, x)
    assert_gradients_close(y, expected, [x, *factors(model)])
    leaves, twice = [x, *factors(model)], []
    for z in (model(x), with_deltas(base, model, x)):
        (first,) = torch.autograd.grad(z.pow(3).sum(), x, create_graph=True)
        twice.append(torch.autograd.grad(first.square().sum(), leaves))
    for one, other in zip(*twice, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"groups": 5}], ids=str)
def test_an_output_can_be_written_into(options: dict[str, int], path: str, last: bool) -> None:
    base = nn.Sequential(nn.Conv2d(5, 40, 2, **options), nn.ReLU(inplace=True)).double()
    model = deepcopy(base)
    inject(model, LoRA(rank=2, path=path, targets="all"))
    randomize(model)
    x = torch.randn(1, 5, 4, 6, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    y, expected = model(x), with_deltas(base, model, x)
    assert_close(y, expected, 1e-10)
    assert_gradients_close(y, expected, factors(model))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layer", ["narrow", "patches"])
def test_an_empty_batch_has_gradients(layer: str, path: str) -> None:
    narrow = layer == "narrow"
    model = nn.Sequential(nn.Linear(6, 20) if narrow else nn.Conv2d(1, 64, 4, stride=4))
    inject(model, LoRA(rank=2, path=path, targets="all"))
    x = torch.zeros((0, 6) if narrow else (0, 1, 12, 4), requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert all(not p.grad.any() for p in factors(model))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("path", ["side", "rebuilt", "merged"])
@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}], ids=str)
def test_vmap_over_convolutions(options: dict[str, int], path: str, training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(5, 40, 2, **options)).double()
    inject(model, LoRA(rank=2, path=path, targets="all"))
    randomize(model)
    model.train(training)
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    assert_close(torch.vmap(lambda each: model(each[None])[0])(x), model(x), 1e-10)
    loss = torch.func.grad(lambda each: model(each[None]).square().sum())
    leaf = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    assert_close(torch.vmap(loss)(x), expected, 1e-10)


@table(FAMILIES)
def test_input_or_factors_alone_may_need_gradients(case: Case, method: str, path: str) -> None:
    model, base = adapt(case, method, path)
    inputs = case.inputs()
    assert_gradients_close(model(*inputs), with_deltas(base, model, *inputs), factors(model))
    for parameter in factors(model):
        parameter.requires_grad_(False)
    moving, leaves = differentiable(inputs)
    if leaves:
        assert_gradients_close(model(*moving), with_deltas(base, model, *moving), leaves)


@pytest.mark.parametrize(
    "autocast", [None, torch.bfloat16, torch.float16], ids=["off", "bf16", "fp16"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@table(["linear", "conv2d", "conv2d-reflect", "conv2d-depthwise7", "attention-fused", "raw-2d"])
def test_dtypes_with_and_without_autocast(
    case: Case, method: str, path: str, dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    model, base = adapt(case, method, path, dtype=dtype)
    inputs, leaves = differentiable(case.inputs(dtype))

    def context() -> torch.autocast:
        return torch.autocast("cpu", autocast, enabled=autocast is not None)

    with context():
        try:
            plain = base(*inputs)
        except RuntimeError as error:
            pytest.skip(f"torch itself: {error}")
        y = model(*inputs)
    assert y.dtype == plain.dtype
    coarsest = min((dtype, autocast or dtype), key=lambda kind: -torch.finfo(kind).eps)
    tolerance = 8 * torch.finfo(coarsest).eps
    assert_close(y.detach(), reference64(base, model, *inputs), tolerance)
    y.float().square().sum().backward()
    for leaf in (*leaves, *factors(model)):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.isfinite().all()
    model.eval()
    with torch.no_grad(), context():
        quiet = model(*inputs)
    assert quiet.dtype == plain.dtype
    assert_close(quiet, y.detach(), tolerance, "no_grad against grad")


@table(FAMILIES)
def test_checkpointing_gives_the_same_gradients(case: Case, method: str, path: str) -> None:
    model, _ = adapt(case, method, path)
    inputs, leaves = differentiable(case.inputs())
    model(*inputs).square().sum().backward()
    expected = [p.grad for p in factors(model)]
    for reentrant in (True, False):
        if reentrant and not leaves:
            continue  # reentrant checkpointing needs an input with a gradient
        model.zero_grad()
        checkpoint(model, *inputs, use_reentrant=reentrant).square().sum().backward()
        for parameter, gradient in zip(factors(model), expected, strict=True):
            assert parameter.grad is not None
            assert_close(parameter.grad, gradient, 1e-12, f"{reentrant=}")


@table(
    ["linear", "conv2d", "conv2d-groups", "conv2d-1x1", "conv2d-depthwise7", "embedding"],
    BOTH,
    path=False,
)
def test_dropout(case: Case, method: str, path: str) -> None:
    model, base = adapt(case, method, path, dropout=0.5)
    inputs = case.inputs()
    expected = with_deltas(base, model, *inputs)
    model.eval()
    assert_close(model(*inputs), expected, 1e-10, "eval drops nothing")
    model.train()
    torch.manual_seed(3)
    first = model(*inputs)
    second = model(*inputs)
    torch.manual_seed(3)
    assert torch.equal(model(*inputs), first), "the same seed, the same mask"
    assert not torch.equal(first, second), "another mask"
    torch.manual_seed(3)
    got = gradients(model(*inputs), factors(model))
    assert all(g.isfinite().all() for g in got)
    mean = torch.stack([model(*inputs) for _ in range(600)]).mean(0)
    assert relative_error(mean, expected) < 0.25, "the mask is scaled to keep the mean"
    assert relative_error(mean, base(*inputs)) > relative_error(mean, expected)


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"path": "side"}], ids=["dropout", "side"])
@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("attention-fused", "flora"),
        ("attention-split", "lora"),
        ("raw-2d", "lora"),
        ("raw-3d-experts", "flora"),
        ("conv2d-groups", "lora_loralib"),
        ("conv2d", "lora_article"),
        ("linear", "dora"),
        ("conv2d", "mora"),
        ("embedding", "loha"),
        ("linear", "lokr"),
    ],
)
def test_what_needs_a_side_path_is_refused_where_there_is_none(
    case: str, method: str, options: dict[str, Any]
) -> None:
    model = BY_ID[case].model()
    with unchanged(model), pytest.raises(AdapterError, match=rf"(?s)layer.*{next(iter(options))}"):
        inject(model, METHODS[method](targets=BY_ID[case].target, **options))


def test_dropout_on_the_merged_path_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"(?s)dropout.*side"):
        adapt(BY_ID["linear"], path="merged", dropout=0.1)


@pytest.mark.parametrize("method", SQUARE)
@pytest.mark.parametrize(
    "case", ["conv1d-stride2", "conv2d-circular-asymmetric", "conv_transpose2d"]
)
def test_square_forms_of_lora_are_refused_elsewhere(case: str, method: str) -> None:
    model = BY_ID[case].model()
    with unchanged(model), pytest.raises(AdapterError, match=r"square.*layer\.weight"):
        inject(model, METHODS[method](targets="layer"))


@pytest.mark.parametrize("size", [[7, 9], [8, 9]], ids=str)
@table(["conv_transpose2d"])
def test_output_size_of_a_transposed_convolution(
    case: Case, method: str, path: str, size: list[int]
) -> None:
    model, base = adapt(case, method, path)
    (x,) = case.inputs()
    with torch.no_grad():
        base.layer.weight += deltas(model)["layer.weight"].dense()
    expected = base.layer(x, size)
    assert_close(model.layer(x, size), expected, 1e-10)
    assert_close(model.layer(x, output_size=size), expected, 1e-10)
    assert_close(model.layer(output_size=size, input=x), expected, 1e-10, "by name, any order")


@table(["linear", "conv2d", "conv2d-1x1", "conv2d-groups", "conv2d-depthwise7", "raw-3d-experts"])
def test_no_changed_weight_is_kept_for_backward(case: Case, method: str, path: str) -> None:
    """W + dW under plain autograd holds a second copy of the model until backward."""
    wide = Case(
        case.id, _widened(case), lambda b: (torch.randn(b, *_wide_input[case.id]),), case.target
    )
    model, _ = adapt(wide, path=path)
    weight = model.get_parameter(next(iter(deltas(model))))
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            kept.append(tensor)
        return tensor

    inputs, _ = differentiable(wide.inputs(batch=1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(*inputs)
    assert kept, "nothing was saved: nothing was measured"
    assert y.requires_grad
    sizes = {tensor.numel() for tensor in kept} | {t.untyped_storage().size() for t in kept}
    assert weight.numel() not in sizes, [tuple(tensor.shape) for tensor in kept]


_wide_input = {
    "linear": (64,),
    "conv2d": (48, 4, 4),
    "conv2d-1x1": (64, 2, 2),
    "conv2d-groups": (48, 3, 3),
    "conv2d-depthwise7": (48, 3, 3),
    "raw-3d-experts": (3, 64),
}


def _widened(case: Case) -> Callable[[], nn.Module]:
    """The same kind of layer, with a weight much larger than its activations."""
    return {
        "linear": lambda: nn.Linear(64, 96),
        "conv2d": lambda: nn.Conv2d(48, 64, 3, padding=1),
        "conv2d-1x1": lambda: nn.Conv2d(64, 96, 1),
        "conv2d-groups": lambda: nn.Conv2d(48, 64, 3, padding=1, groups=2),
        "conv2d-depthwise7": lambda: nn.Conv2d(48, 48, 7, padding=3, groups=48),
        "raw-3d-experts": lambda: Experts(3, 64, 80),
    }[case.id]


def test_nothing_but_autograd_keeps_a_changed_weight_either() -> None:
    """A tensor stashed on a context object escapes the hooks of saved tensors, not this one."""
    model, _ = adapt(
        Case("l", lambda: nn.Linear(61, 97), lambda b: (torch.randn(b, 61),)), path="merged"
    )
    (x,) = differentiable((torch.randn(2, 61, dtype=torch.float64),))[0]

    def alive() -> int:
        gc.collect()
        return sum(
            type(o) in (Tensor, nn.Parameter) and o.numel() == 61 * 97 for o in gc.get_objects()
        )

    before = alive()
    y = model(x)
    assert alive() == before
    y.sum().backward()
    assert alive() == before


@table([*DENSE, "conv2d-groups", "attention-fused"])
def test_compiles_whole_and_once(case: Case, method: str, path: str) -> None:
    torch._dynamo.reset()
    model, _ = adapt(case, method, path)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(factors(model), lr=1e-3)
    for step in range(3):
        inputs, leaves = differentiable(case.inputs())
        wanted = [*leaves, *factors(model)]
        y, expected = compiled(*inputs), model(*inputs)
        assert_close(y, expected, 1e-10, f"step {step}")
        got = torch.autograd.grad(y.square().sum(), wanted)
        want = torch.autograd.grad(expected.square().sum(), wanted)
        for parameter, g, w in zip(wanted, got, want, strict=True):
            assert_close(g, w, 1e-9, f"gradient at step {step}")
            parameter.grad = g
        optimizer.step()
    assert counter.frame_count == 1, f"compiled {counter.frame_count} times"


@pytest.mark.parametrize("path", ["side", pytest.param("merged", marks=pytest.mark.slow)])
def test_inductor(path: str) -> None:
    torch._dynamo.reset()
    model, _ = adapt(BY_ID["linear"], path=path, dtype=torch.float32)
    inputs, leaves = differentiable(BY_ID["linear"].inputs(torch.float32))
    compiled = torch.compile(model, fullgraph=True)(*inputs)
    assert_close(compiled, model(*inputs), 1e-5)
    assert_gradients_close(compiled, model(*inputs), [*leaves, *factors(model)], 1e-4)


@table(FAMILIES)
def test_functional_call_is_not_fooled_by_a_cache(case: Case, method: str, path: str) -> None:
    model, _ = adapt(case, method, path)
    model.eval()
    inputs = case.inputs()
    with torch.no_grad():
        y = model(*inputs)
        other = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
        changed = functional_call(model, other, inputs)
        assert relative_error(changed, y) > 1e-2
        assert torch.equal(model(*inputs), y), "and back"
        frozen = next(name for name in deltas(model))
        swapped = functional_call(
            model, {frozen: torch.zeros_like(model.get_parameter(frozen))}, inputs
        )
        assert relative_error(swapped, y) > 1e-2, "a changed base weight"
        with torch.no_grad():
            model.get_parameter(frozen).zero_()
        assert_close(model(*inputs), swapped, 1e-12, "a base weight changed in place")


@table(["attention-fused", "attention-split"], path=False)
def test_attention_with_masks_and_weights(case: Case, method: str, path: str) -> None:
    model, base = adapt(case, method, path)
    inputs = case.inputs()
    source = inputs[1].shape[1]
    options: list[dict[str, Any]] = [
        {"need_weights": False},
        {"average_attn_weights": False},
        {"key_padding_mask": torch.arange(source).eq(source - 1).repeat(2, 1)},
        {"attn_mask": torch.ones(3, source, dtype=torch.bool).triu(1)},
    ]
    for option in options:
        for holder in (model, base):
            holder.options = option
        expected = with_deltas(base, model, *inputs)
        assert relative_error(base(*inputs), expected) > 1e-2
        for training in (True, False):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    assert_close(
                        model.train(training)(*inputs),
                        expected,
                        1e-10,
                        f"{option} {training=} {grad=}",
                    )


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_fast_path_does_not_bypass_adapters(norm_first: bool) -> None:
    """In eval without gradients torch hands the raw weights to one fused kernel."""
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    model = nn.Sequential()
    model.add_module(
        "encoder", nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    )
    model.double()
    base = deepcopy(model)
    inject(model, METHODS["flora"](targets="all"))
    randomize(model)
    changed = {name.rpartition(".")[0].rpartition(".")[2] for name in deltas(model)} | {"self_attn"}
    assert {"linear1", "linear2", "self_attn"} <= changed
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = with_deltas(base, model, x)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model.eval(), base.eval()
    assert relative_error(base(x), expected) > 1e-2
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_close(model(x), expected, 1e-10, f"{grad=}")
    with torch.no_grad():
        quiet = model.encoder(x, src_key_padding_mask=padding)
    train = model.train().encoder(x, src_key_padding_mask=padding)
    assert_close(quiet[:, :3], train[:, :3], 1e-10, "with padding")


def test_paths_are_as_asked_and_shown() -> None:
    for path in ("side", "merged"):
        model, _ = adapt(BY_ID["linear"], path=path)
        assert [row.path for row in summary(model).rows] == [path]

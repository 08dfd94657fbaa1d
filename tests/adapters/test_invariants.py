"""What holds for every layer type, method and path: one table, one explicit reference."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from litflora.adapters import AdapterError, disabled, merge, unload, unmerge

from .cases import (
    BOTH,
    BY_ID,
    CASES,
    DTYPES,
    FAMILIES,
    MATRICES,
    METHODS,
    PATHS,
    Case,
    adapt,
    assert_close,
    assert_gradients_close,
    deltas,
    differentiable,
    factors,
    paths_of,
    randomize,
    reference64,
    relative_error,
    table,
    with_deltas,
)
from .toys import snapshot, unchanged


@table(methods=METHODS)
def test_identity_at_start(case: Case, method: str, path: str) -> None:
    model, base = adapt(case, method, path, random=False)
    inputs = case.inputs()
    for training in (True, False):
        for grad in (True, False):
            model.train(training), base.train(training)
            # torch folds a matmul, and so rounds it, by whether its weight asks for a gradient.
            base.requires_grad_(grad)
            with torch.set_grad_enabled(grad):
                assert torch.equal(model(*inputs), base(*inputs)), f"{training=} {grad=}"


@table(methods=METHODS)
def test_value_and_gradients_are_those_of_w_plus_dw(case: Case, method: str, path: str) -> None:
    model, base = adapt(case, method, path)
    inputs, leaves = differentiable(case.inputs())
    wanted = [*leaves, *factors(model)]

    expected = with_deltas(base, model, *inputs)
    assert relative_error(base(*inputs), expected) > 1e-2, "no effect: a vacuous test"
    y = model.train()(*inputs)
    assert_close(y, expected, 1e-10)
    assert_gradients_close(y, expected, wanted)

    model.eval()
    assert_close(model(*inputs), expected, 1e-10, "eval")
    with torch.no_grad():
        assert_close(model(*inputs), expected, 1e-10, "eval, no_grad")
        randomize(model)  # whatever no_grad may have cached is out of date now
        assert_close(model(*inputs), with_deltas(base, model, *inputs), 1e-10, "after a change")
    with torch.inference_mode():
        assert_close(model(*inputs), with_deltas(base, model, *inputs), 1e-10, "inference_mode")


@table(methods=METHODS)
def test_merge_is_forward_and_unmerge_restores(case: Case, method: str, path: str) -> None:
    model, base = adapt(case, method, path)
    model.eval()
    inputs = case.inputs()
    base.requires_grad_(False)
    with torch.no_grad():
        before, expected = model(*inputs), with_deltas(base, model, *inputs)
    with unchanged(model):
        merge(model)
        with torch.no_grad():
            assert_close(model(*inputs), expected, 1e-10, "merged")
        with disabled(model), torch.no_grad():
            assert torch.equal(model(*inputs), base(*inputs)), "disabled while merged"
        for parameter, delta in deltas(model).items():
            merged = model.get_parameter(parameter)
            assert_close(merged, base.get_parameter(parameter) + delta.dense(), 1e-12, parameter)
        unmerge(model)
    with torch.no_grad():
        assert torch.equal(model(*inputs), before)


@table(methods=BOTH)
def test_float32_is_within_rounding_of_float64(case: Case, method: str, path: str) -> None:
    model, base = adapt(case, method, path, torch.float32)
    model.eval()
    inputs = case.inputs(torch.float32)
    expected = reference64(base, model, *inputs)
    y = model(*inputs)
    assert y.dtype == torch.float32
    assert_close(y.detach(), expected, 1e-5)
    merge(model)
    assert_close(model(*inputs).detach(), expected, 1e-5, "merged")


@table(FAMILIES, BOTH)  # not DoRA: its norm is a constant in backward by definition
def test_gradcheck(case: Case, method: str, path: str) -> None:
    model, _ = adapt(case, method, path)
    inputs, leaves = differentiable(case.inputs(batch=1))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = [x for x in inputs if not x.requires_grad]

    def function(*values: Tensor) -> Tensor:
        given_inputs = frozen or _spread(inputs, values[: len(leaves)])
        changed = dict(zip(parameters, values[len(leaves) :], strict=True))
        return functional_call(model, changed, tuple(given_inputs))

    values = (*leaves, *parameters.values())
    assert torch.autograd.gradcheck(function, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


def _spread(inputs: tuple[Tensor, ...], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """As many inputs as the layer takes, where one leaf may stand for several of them."""
    distinct = list(dict.fromkeys(map(id, inputs)))
    return [leaves[distinct.index(id(x))] for x in inputs]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Case, str, str]:
    """Any convolution, or transposed one, that torch itself accepts."""
    dims = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    groups = draw(st.integers(1, 3))
    io = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))

    def per_mode(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation, stride = per_mode(1, 4), per_mode(1, 2), per_mode(1, 3)
    options: dict[str, Any] = {"groups": groups, "bias": draw(st.booleans()), "dilation": dilation}
    size = tuple(
        d * (k - 1) + 1 + draw(st.integers(0, 3)) for k, d in zip(kernel, dilation, strict=True)
    )
    if transposed:
        options |= {
            "stride": stride,
            "padding": tuple(
                min(p, (k - 1) // 2) for p, k in zip(per_mode(0, 1), kernel, strict=True)
            ),
        }
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        kind: type[nn.Module] = getattr(nn, f"ConvTranspose{dims}d")
    else:
        options["padding_mode"] = draw(
            st.sampled_from(["zeros", "reflect", "circular", "replicate"])
        )
        if draw(st.booleans()):
            options["padding"] = draw(st.sampled_from(["same", "valid"]))
        else:  # reflection needs less padding than there is input
            options |= {
                "stride": stride,
                "padding": tuple(min(p, n - 1) for p, n in zip(per_mode(0, 2), size, strict=True)),
            }
        kind = getattr(nn, f"Conv{dims}d")
    square = dims == 2 and not transposed and kernel[0] == kernel[1]
    case = Case(
        "drawn",
        lambda: kind(*io, kernel, **options),
        lambda batch: (torch.randn(batch, io[0], *size),),
    )
    case = replace(case, square=square)
    method = draw(st.sampled_from([name for name in METHODS if paths_of(case, name)]))
    return case, method, draw(st.sampled_from(paths_of(case, method)))


def _explicit(case: Case, method: str, path: str) -> None:
    """Value, gradients and merge of one drawn case against W + dW."""
    model, base = adapt(case, method, path)
    inputs, leaves = differentiable(case.inputs())
    wanted = [*leaves, *factors(model)]
    expected = with_deltas(base, model, *inputs)
    y = model(*inputs)
    assert_close(y, expected, 1e-10)
    assert_gradients_close(y, expected, wanted)
    merge(model.eval())
    assert_close(model(*inputs), expected, 1e-10, "merged")


@given(convolutions())
def test_drawn_convolutions(drawn: tuple[Case, str, str]) -> None:
    case, method, path = drawn
    try:
        case.model()(*case.inputs())
    except RuntimeError:  # torch refuses this geometry itself
        return
    _explicit(case, method, path)


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.lists(st.integers(1, 5), max_size=3),
    st.booleans(),
    st.sampled_from(["flora", "flora_paper", "lora"]),
    st.sampled_from(PATHS),
)
def test_drawn_linears(
    width: int, out: int, batch: list[int], bias: bool, method: str, path: str
) -> None:
    case = Case(
        "drawn", lambda: nn.Linear(width, out, bias=bias), lambda _: (torch.randn(*batch, width),)
    )
    _explicit(case, method, path)


@pytest.mark.parametrize("rows", [1, 7, 300, 3000])
@pytest.mark.parametrize("method", ["flora", "lora"])
def test_auto_is_right_on_both_sides_of_its_crossover(method: str, rows: int) -> None:
    case = Case("wide", lambda: nn.Linear(40, 56), lambda _: (torch.randn(rows, 40),))
    _explicit(case, method, "auto")


@table(FAMILIES, [*BOTH, "dora", *MATRICES], path=False)
def test_only_deltas_learn_and_all_of_them_do(case: Case, method: str, path: str) -> None:
    model, base = adapt(case, method, random=False)
    inputs = case.inputs()
    start = [p.detach().clone() for p in factors(model)]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    target = torch.randn_like(base(*inputs))
    for _ in range(3):
        optimizer.zero_grad()
        (model(*inputs) - target).square().mean().backward()
        optimizer.step()
    own = {id(p) for p in factors(model)}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in own), name
        assert parameter.requires_grad == (id(parameter) in own), name
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), f"base {name} changed"
    for old, new in zip(start, factors(model), strict=True):
        assert not torch.equal(old, new), "a delta parameter never moved"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@table(FAMILIES, path=False)
def test_unmerge_is_bit_exact_in_every_dtype(
    case: Case, method: str, path: str, dtype: torch.dtype
) -> None:
    model, _ = adapt(case, dtype=dtype)
    with unchanged(model):
        merge(model)
        merge(model)  # merging what is merged changes nothing more
        unmerge(model)
        unmerge(model)


@table(path=False)
def test_the_layer_stays_what_it_was(case: Case, method: str, path: str) -> None:
    model, base = adapt(case)
    for name, original in base.named_modules():
        layer = model.get_submodule(name)
        assert isinstance(layer, type(original))
        for attribute in (
            "stride",
            "padding",
            "dilation",
            "groups",
            "in_features",
            "out_features",
            "in_channels",
            "embedding_dim",
            "padding_idx",
            "kernel_size",
            "padding_mode",
            "embed_dim",
            "nf",
            "training",
        ):
            if hasattr(original, attribute):
                assert getattr(layer, attribute) == getattr(original, attribute), attribute
    for name, parameter in base.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), f"{name} reads differently"
    keys = [key for key in model.state_dict() if ".adapters." not in key]
    assert keys == list(base.state_dict()), "the base's keys, in their order"
    assert all(
        f".adapters.default.{name.split('.')[-1]}" in "".join(model.state_dict())
        for name in deltas(model)
    )
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected
    assert all(".adapters." in key for key in missing)
    text = repr(model)
    assert type(base.layer).__name__ in text
    if "__repr__" not in vars(type(base.layer)):  # a layer's own way of printing is respected
        assert "rank=" in text


@table(FAMILIES, path=False)
def test_unload_leaves_no_trace(case: Case, method: str, path: str) -> None:
    model, base = adapt(case, method, path)
    base.requires_grad_(False)  # the one thing that injection leaves: the base stays frozen
    inputs = case.inputs()
    expected = with_deltas(base, model, *inputs)
    baked = deepcopy(model)
    unload(model)
    assert snapshot(model) == snapshot(base)
    assert torch.equal(model(*inputs), base(*inputs))

    merge(baked, unload=True)
    assert [type(module) for module in baked.modules()] == [
        type(module) for module in base.modules()
    ]
    assert list(baked.state_dict()) == list(base.state_dict())
    assert not any(hasattr(module, "adapters") for module in baked.modules())
    assert_close(baked(*inputs), expected, 1e-10)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@table(FAMILIES, path=False)
def test_merge_refuses_what_is_not_finite(
    case: Case, method: str, path: str, poison: float
) -> None:
    model, _ = adapt(case)
    with torch.no_grad():
        factors(model)[-1].view(-1)[0] = poison
    with unchanged(model), pytest.raises(AdapterError, match="layer"):
        merge(model)


@pytest.mark.parametrize("freeze", ["freeze_factors", "freeze_spatial"])
def test_frozen_factors(freeze: str) -> None:
    case = BY_ID["conv2d"]
    model, base = adapt(case, **{freeze: True}, random=False)
    delta = deltas(model)["layer.weight"]
    trained = {name for name, p in delta.named_parameters() if p.requires_grad}
    assert trained == (
        {"core"} if freeze == "freeze_factors" else {"core", "factors.0", "factors.1"}
    )
    start = {name: p.detach().clone() for name, p in delta.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(*case.inputs()).square().sum().backward()
        optimizer.step()
    moved = {name for name, p in delta.named_parameters() if not torch.equal(p, start[name])}
    assert moved == trained
    inputs = case.inputs()
    assert_close(model(*inputs), with_deltas(base, model, *inputs), 1e-10)


def test_the_table_itself() -> None:
    """A base that ignored its weight would pass every comparison."""
    for case in CASES:
        model = case.model()
        before = model(*case.inputs())
        assert before.isfinite().all(), case.id
    assert len(BY_ID) == len(CASES)

"""The table of layers every adapter is tried on, and the explicit W + dW it is held against.

The reference never goes through the engine's forward: it is the base layer's own operation, on a
copy made before injection, called with W + dW in place of W by `torch.func.functional_call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from litflora.adapters import (
    AdaLoRA,
    DoRA,
    FLoRA,
    LoHa,
    LoKr,
    LoRA,
    MoRA,
    OLoRA,
    PiSSA,
    Tuning,
    inject,
)

PATHS = ("side", "rebuilt", "merged", "auto")


class Holder(nn.Module):
    """One layer under the name `layer`; a tuple of outputs is flattened into one tensor."""

    def __init__(self, layer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.layer = layer
        self.options = options

    def forward(self, *inputs: Tensor) -> Tensor:
        y = self.layer(*inputs, **self.options)
        if isinstance(y, tuple):
            return torch.cat([part.flatten() for part in y if part is not None])
        return y


class Mixture(nn.Module):
    """A raw [in, out] parameter: what a layer of somebody else's making looks like."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, columns) / rows**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.table)


class Experts(nn.Module):
    """Fused experts [E, in, out], each taking its own slice of the batch."""

    def __init__(self, experts: int, width: int, out: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(experts, width, out) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bni,nio->bno", x, self.gate_up)


class Standardised(nn.Conv2d):
    """A layer with a forward of its own: weight-standardised, as in timm's ResNetV2."""

    def forward(self, x: Tensor) -> Tensor:
        dims = (1, 2, 3)
        weight = self.weight - self.weight.mean(dims, keepdim=True)
        weight = weight / (weight.std(dims, keepdim=True) + 1e-3)
        return self._conv_forward(x, weight, self.bias)


@dataclass(frozen=True)
class Case:
    """One layer geometry: how to build it, what to feed it, what to name as the target."""

    id: str
    build: Callable[[], nn.Module]
    feed: Callable[[int], tuple[Tensor, ...]]
    target: str = "layer"
    square: bool = False  # a 2-D convolution with a square kernel: all forms of LoRA are defined

    stack: bool = False  # many matrices in one parameter
    known: bool = True  # attention, raw parameters, own forwards: nothing to run a chain beside

    def model(self, dtype: torch.dtype = torch.float64) -> Holder:
        built = self.build()
        return (built if isinstance(built, Holder) else Holder(built)).to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[Tensor, ...]:
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in self.feed(batch))


def _conv(
    kind: type[nn.Module],
    name: str,
    io: tuple[int, int],
    kernel: Any,
    size: tuple[int, ...],
    **options: Any,
) -> Case:
    """`size` is the input's, behind batch and channels; `mode` is short for the padding mode."""
    if "mode" in options:
        options["padding_mode"] = options.pop("mode")

    def feed(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, io[0], *size),)

    square = issubclass(kind, nn.Conv2d) and (isinstance(kernel, int) or kernel[0] == kernel[1])
    build, known = partial(kind, *io, kernel, **options), kind is not Standardised
    return Case(name, build, feed, square=square, known=known)


def _dense(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], target: str = "layer"
) -> Case:
    return Case(
        name,
        build,
        lambda batch: (torch.randn(batch, *shape),),
        target,
        known=target == "layer",
    )


def _embedding(name: str, **options: Any) -> Case:
    def feed(batch: int) -> tuple[Tensor]:
        return (torch.arange(batch * 5).reshape(batch, 5) % 7,)

    return Case(name, partial(nn.Embedding, 7, 6, **options), feed)


def _attention(name: str, memory: tuple[int, int] | None = None, **options: Any) -> Case:
    """`memory` = the widths of key and value where they are not the query itself."""

    def build() -> Holder:
        widths = {"kdim": memory[0], "vdim": memory[1]} if memory else {}
        layer = nn.MultiheadAttention(8, 2, batch_first=True, **widths, **options)
        for parameter in (layer.in_proj_bias, layer.out_proj.bias):
            if parameter is not None:
                nn.init.normal_(parameter)
        return Holder(layer)

    def feed(batch: int) -> tuple[Tensor, ...]:
        query = torch.randn(batch, 3, 8)
        if memory is None:
            return (query, query, query)
        return (query, torch.randn(batch, 4, memory[0]), torch.randn(batch, 4, memory[1]))

    return Case(name, build, feed, target="attention", known=False)


def _transformers_conv1d() -> list[Case]:
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:  # the row is simply not in the table where transformers is missing
        return []

    def build() -> nn.Module:
        layer = Conv1D(9, 6)
        nn.init.normal_(layer.weight)
        return layer

    return [_dense("transformers_conv1d", build, (4, 6))]


_conv1d, _conv2d, _conv3d = (partial(_conv, k) for k in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
_up1d = partial(_conv, nn.ConvTranspose1d)
_up2d = partial(_conv, nn.ConvTranspose2d)
_up3d = partial(_conv, nn.ConvTranspose3d)

CASES: list[Case] = [
    _dense("linear", partial(nn.Linear, 6, 9), (6,)),
    _dense("linear-no_bias-tokens", partial(nn.Linear, 6, 9, bias=False), (3, 2, 6)),
    _dense("linear-narrower_than_rank", partial(nn.Linear, 2, 5), (2,)),
    _conv1d("conv1d-stride2", (4, 6), 5, (11,), stride=2, padding=2),
    _conv1d("conv1d-groups-circular", (4, 6), 3, (9,), groups=2, padding=2, mode="circular"),
    _conv1d("conv1d-depthwise-same-even", (4, 4), 4, (9,), groups=4, padding="same"),
    _conv2d("conv2d", (4, 6), 3, (6, 5), padding=1),
    _conv2d(
        "conv2d-no_bias-asymmetric",
        (4, 6),
        (3, 5),
        (7, 8),
        stride=(2, 1),
        padding=(1, 2),
        bias=False,
    ),
    _conv2d("conv2d-same-even-dilated", (3, 5), (2, 4), (6, 7), padding="same", dilation=(2, 1)),
    _conv2d("conv2d-same-reflect-even", (3, 5), (4, 3), (6, 7), padding="same", mode="reflect"),
    _conv2d("conv2d-valid-dilated", (4, 6), 3, (8, 7), padding="valid", dilation=2),
    _conv2d("conv2d-reflect", (4, 6), 3, (6, 5), padding=2, mode="reflect"),
    _conv2d(
        "conv2d-replicate-dilated-stride2",
        (4, 6),
        3,
        (8, 7),
        padding=(2, 1),
        mode="replicate",
        dilation=2,
        stride=2,
    ),
    _conv2d("conv2d-circular-asymmetric", (4, 6), (1, 5), (5, 6), padding=(0, 2), mode="circular"),
    _conv2d("conv2d-groups", (4, 6), 3, (6, 5), padding=1, groups=2),
    _conv2d(
        "conv2d-groups-dilated-reflect",
        (4, 8),
        (3, 2),
        (7, 7),
        padding=(2, 1),
        groups=4,
        dilation=2,
        mode="reflect",
    ),
    _conv2d("conv2d-depthwise7", (6, 6), 7, (8, 8), padding=3, groups=6),
    _conv2d(
        "conv2d-depthwise-twice-stride2",
        (3, 6),
        3,
        (7, 6),
        padding=1,
        stride=2,
        groups=3,
        bias=False,
    ),
    _conv2d("conv2d-1x1", (6, 9), 1, (3, 4)),
    _conv2d("conv2d-1x1-stride2-padded", (6, 9), 1, (4, 5), stride=2, padding=1),
    _conv2d("conv2d-patchify", (3, 8), 4, (8, 12), stride=4),
    _conv3d("conv3d-asymmetric", (3, 4), (1, 3, 2), (3, 5, 4), stride=(1, 2, 1), padding=(0, 1, 1)),
    _conv3d(
        "conv3d-depthwise-replicate", (4, 4), 3, (4, 4, 3), padding=1, mode="replicate", groups=4
    ),
    _up1d("conv_transpose1d-groups", (4, 6), 4, (5,), stride=2, groups=2),
    _up2d("conv_transpose2d", (4, 6), 3, (4, 5), stride=2, padding=1, output_padding=1),
    _up2d("conv_transpose2d-dilated-asymmetric", (4, 6), (2, 3), (4, 5), dilation=2, bias=False),
    _up2d("conv_transpose2d-depthwise", (4, 4), 4, (4, 4), stride=2, padding=1, groups=4),
    _up3d("conv_transpose3d", (3, 4), (1, 2, 3), (2, 3, 3), stride=(1, 2, 1)),
    _embedding("embedding"),
    _embedding("embedding-padding_idx", padding_idx=2),
    _attention("attention-fused"),
    _attention("attention-fused-no_bias-zero_attn", bias=False, add_zero_attn=True),
    _attention("attention-fused-cross-bias_kv", memory=(8, 8), add_bias_kv=True),
    _attention("attention-split", memory=(5, 7)),
    *_transformers_conv1d(),
    _conv(Standardised, "conv2d-own_forward", (4, 6), 3, (6, 5), padding=1, groups=2),
    _dense("raw-2d", partial(Mixture, 6, 9), (6,), target="layer.table"),
    replace(
        _dense("raw-3d-experts", partial(Experts, 3, 6, 8), (3, 6), target="layer.gate_up"),
        stack=True,
    ),
]

BY_ID = {case.id: case for case in CASES}

# A layer of each family: for the properties that do not depend on the finer geometry.
FAMILIES = (
    "linear",
    "conv1d-groups-circular",
    "conv2d-same-even-dilated",
    "conv2d-groups",
    "conv2d-depthwise7",
    "conv2d-1x1",
    "conv3d-asymmetric",
    "conv_transpose2d",
    "embedding-padding_idx",
    "attention-fused",
    "attention-split",
    "raw-3d-experts",
)
DENSE = ("linear", "conv2d", "conv2d-reflect", "conv2d-depthwise7", "conv2d-1x1", "raw-2d")
BOTH = ("flora", "lora")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

METHODS: dict[str, Callable[..., Tuning]] = {
    "flora": partial(FLoRA, rank=3, spatial_rank=2, scale=0.7),
    "flora_paper": partial(FLoRA, rank=4, spatial_rank=1, scale=1.3, init="paper"),
    "lora": partial(LoRA, rank=2, alpha=3.0),
    "adalora": partial(AdaLoRA, rank=3, alpha=4.0),
    "lora_loralib": partial(LoRA, rank=2, alpha=2.0, conv="loralib"),
    "lora_article": partial(LoRA, rank=2, alpha=2.0, conv="article", rank_stabilized=True),
    "pissa": partial(PiSSA, rank=2, alpha=3.0),
    "olora": partial(OLoRA, rank=2, alpha=3.0),
    "dora": partial(DoRA, rank=2, alpha=3.0),
    "mora": partial(MoRA, rank=1, kind="sharing"),
    "mora_rope": partial(MoRA, rank=1, kind="rope"),
    "loha": partial(LoHa, rank=2, alpha=3.0),
    "lokr": partial(LoKr, rank=1, alpha=1.5, decompose_both=True),
}


FIRST = ("flora", "flora_paper", "lora", "lora_loralib", "lora_article")
SQUARE = ("lora_loralib", "lora_article")  # defined for square kernels; they have no low-rank chain
ONE_MATRIX = ("pissa", "olora", "adalora")  # not defined for a stack
# dW is made as one matrix.
MATRICES = ("mora", "mora_rope", "loha", "lokr")


def paths_of(case: Case, method: str) -> tuple[str, ...]:
    """The paths that a method has on a layer; none where the method is not defined."""
    if method in SQUARE:
        return ("merged", "auto") if case.square else ()
    if method in ONE_MATRIX and case.stack:
        return ()
    if method in ("dora", *MATRICES):  # no low-rank chain, and not defined for stacks of matrices
        paths = ("merged", "auto") if method == "dora" else ("auto",)  # the same, without a chain
        return () if case.stack else paths
    return PATHS if case.known else ("merged", "auto")


def table(ids: Iterable[str] = (), methods: Iterable[str] = ("flora",), path: bool = True) -> Any:
    """Parametrises a test by layer x method x path, of those that exist.

    All layers where no ids are given, those beside `FAMILIES` marked slow but for the methods that
    all others are made of (`FIRST`); a test without `path` runs each method once.
    """
    ids = list(ids)
    rows = [
        pytest.param(
            case,
            method,
            kind,
            id="-".join(filter(None, (case.id, method, path and kind))),
            marks=() if ids or method in FIRST or case.id in FAMILIES else pytest.mark.slow,
        )
        for method in methods
        for case in ([BY_ID[name] for name in ids] or CASES)
        for kind in (paths_of(case, method) if path else paths_of(case, method)[-1:])
    ]
    return pytest.mark.parametrize(("case", "method", "path"), rows)


def adapt(
    case: Case,
    method: str = "flora",
    path: str = "auto",
    dtype: torch.dtype = torch.float64,
    random: bool = True,
    **options: Any,
) -> tuple[Holder, Holder]:
    """The case's model with an adapter (filled with noise unless told) and its pristine copy."""
    model = case.model(dtype)
    base = deepcopy(model)
    inject(model, METHODS[method](targets=case.target, path=path, **options))
    if random:
        randomize(model)
    return model, base


def deltas(model: nn.Module, name: str = "default") -> dict[str, nn.Module]:
    """Every delta of adapter `name`, by the full name of the parameter that it changes."""
    return {
        f"{path}.{parameter}".lstrip("."): delta
        for path, module in model.named_modules()
        if name in getattr(module, "adapters", {})
        for parameter, delta in module.adapters[name].items()
    }


def factors(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """Every parameter of adapter `name`'s deltas that trains where it is active."""
    leaves = [leaf for delta in deltas(model, name).values() for _, leaf in delta.leaves() if leaf]
    named = ((leaf, *pair) for leaf in leaves for pair in leaf.named_parameters())
    return [parameter for leaf, key, parameter in named if key not in leaf.frozen()]


@torch.no_grad()
def randomize(model: nn.Module, std: float = 0.4, name: str = "default") -> nn.Module:
    """Fill adapter `name` with noise, so that no invariant holds only because the delta is 0."""
    parameters = factors(model, name)
    assert parameters, f"no delta of adapter {name!r} in the model"
    for parameter in parameters:
        parameter.normal_(std=std)
    return model


def with_deltas(
    base: nn.Module, model: nn.Module, *inputs: Tensor, weights: dict[str, float] | None = None
) -> Any:
    """The base's own operation with W + sum of weighted dW, in the width of the widest input."""
    changed: dict[str, Tensor] = dict(base.named_parameters())
    for name, weight in (weights or {"default": 1.0}).items():
        for parameter, delta in deltas(model, name).items():
            changed[parameter] = changed[parameter] + weight * delta.dense()
    return functional_call(base, changed, inputs)


def reference64(base: nn.Module, model: nn.Module, *inputs: Tensor) -> Tensor:
    """`with_deltas` with every number taken to float64 first."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    return with_deltas(deepcopy(base).double(), deepcopy(model).double(), *wide).detach()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    got, want = actual.detach().double(), expected.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "output") -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def gradients(y: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed, uneven sum over y."""
    cotangent = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    return list(torch.autograd.grad(y, wanted, cotangent))


def assert_gradients_close(
    y: Tensor, expected: Tensor, wanted: list[Tensor], tolerance: float = 1e-9
) -> None:
    """Both outputs have the same gradients for every wanted tensor."""
    pairs = zip(gradients(y, wanted), gradients(expected, wanted), strict=True)
    for n, (got, want) in enumerate(pairs):
        assert_close(got, want, tolerance, f"gradient {n}, of {tuple(want.shape)}")


def differentiable(inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The inputs with gradients asked for (an input given twice stays one), and those that have."""
    leaves: dict[int, Tensor] = {}
    for x in inputs:
        leaves.setdefault(id(x), x.detach().clone().requires_grad_(x.is_floating_point()))
    return tuple(leaves[id(x)] for x in inputs), [x for x in leaves.values() if x.requires_grad]

"""What is adapted, how, and what it costs: figures, printed as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Delta
from .functions import compute_dtype
from .layers import Adapted, adapted_layers, watched
from .lora import conv_parameter_counts
from .measured import paths_file
from .ops import rows as rows_of
from .ops import stride
from .paths import Choice, choose, forced, timed
from .total import Total

# Rows assumed where no example shows how many a layer maps: enough not to be what decides.
MANY_ROWS = 1 << 20

Seen = tuple[int, torch.dtype]  # rows that a layer was given, and the type it computes in


@dataclass(frozen=True)
class Row:
    """One delta.

    Attributes:
        layer: Dotted name of the weight's layer.
        adapter: Name of the adapter.
        param: The weight's own name.
        kind: What the weight is used for.
        shape: The weight's stored shape.
        ranks: The rank of each mode, or the one rank of LoRA.
        clamped: Whether a larger rank was asked for than the weight has.
        params: Parameters of the delta.
        full_params: Parameters of the weight.
        path: The computing path, for the example's rows if there is one.
        timed: Whether it was timed on this machine (see `calibration`).
        lora_params: What LoRA of the same rank would have here, by the formula it is counted by.
    """

    layer: str
    adapter: str
    param: str
    kind: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    clamped: bool
    params: int
    full_params: int
    path: str
    timed: bool
    lora_params: dict[str, int]


@dataclass
class Summary:
    """Figures of a tuned model; ``print`` shows them as a table.

    Attributes:
        rows: One for each delta.
        trainable: Parameters that train, deltas and others.
        total: Parameters of the base.
        adapter_params: Parameters of all deltas, with those that stay as they start.
        adapter_frozen: Of these, those that stay.
        in_place: Names of the base's own parameters that train.
        saved_bytes: Bytes that autograd keeps for the example's backward, parameters left out
            and every storage counted once; None without an example.
        warnings: What deserves a second look.
    """

    rows: list[Row] = field(default_factory=list)
    trainable: int = 0
    total: int = 0
    adapter_params: int = 0
    adapter_frozen: int = 0
    in_place: list[str] = field(default_factory=list)
    saved_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([*self._table(), *self._totals(), *(f"! {w}" for w in self.warnings)])

    def lora_totals(self) -> dict[str, int]:
        """What LoRA of the same ranks would have in all, under each formula that fits all rows."""
        forms = [set(row.lora_params) for row in self.rows]
        common = sorted(set.intersection(*forms)) if forms else []
        return {form: sum(row.lora_params[form] for row in self.rows) for form in common}

    def _table(self) -> list[str]:
        if not self.rows:
            return []
        head = ("weight", "kind", "shape", "rank", "params", "of full", "path")
        body = [
            (
                f"{row.layer}.{row.param}".lstrip(".") + _adapter_tag(row),
                row.kind,
                "x".join(map(str, row.shape)),
                "x".join(map(str, row.ranks)) + ("*" if row.clamped else ""),
                f"{row.params:,}",
                f"{row.params / max(1, row.full_params):.1%}",
                row.path,
            )
            for row in self.rows
        ]
        return [*text_table(head, body), ""]

    def _totals(self) -> Iterator[str]:
        share = self.trainable / self.total if self.total else 0.0
        yield (
            f"trainable {self.trainable:,} ({share:.2%} of the base's {self.total:,}), "
            f"of which in deltas {self.adapter_params - self.adapter_frozen:,}"
            + (f" beside {self.adapter_frozen:,} frozen" if self.adapter_frozen else "")
        )
        if self.rows:
            names = {"peft": "PEFT's form", "loralib": "loralib", "article": "FLoRA article"}
            totals = self.lora_totals()
            if len(set(totals.values())) == 1:
                yield f"LoRA of the same ranks: {next(iter(totals.values())):,}"
            else:
                counts = ", ".join(f"{n:,} ({names[form]})" for form, n in totals.items())
                yield f"LoRA of the same ranks, by its formula on convolutions: {counts}"
        if self.in_place:
            shown, more = self.in_place[:4], len(self.in_place) - 4
            yield f"trained in place: {', '.join(shown)}{f' and {more} more' if more > 0 else ''}"
        if any(row.clamped for row in self.rows):
            yield "* clamped: a larger rank was asked for than the weight has"
        if follow := sum(row.timed for row in self.rows):
            yield f"{follow} paths as `litflora calibrate` timed them: {paths_file()}"
        if self.saved_bytes is not None:
            yield f"saved for backward {self.saved_bytes / 2**20:.1f} MiB"


def summary(model: nn.Module, example: Any = None) -> Summary:
    """Describes what is adapted and trained.

    Args:
        model: A model, adapted or not.
        example: An input, or a tuple of inputs. With one, a forward is run to count the bytes
            kept for backward and to see how many rows each layer maps.

    Returns:
        The figures.
    """
    saved, seen = (None, {}) if example is None else measure(model, example)
    result = Summary(saved_bytes=saved)
    deltas: set[int] = set()
    rounded: list[str] = []
    for name, layer, adapters in adapted_layers(model):
        for adapter in adapters:
            for param, delta in adapters[adapter].items():
                deltas |= {id(p) for p in delta.parameters()}
                row = _row(name, layer, adapter, param, delta, seen.get(name))
                result.rows.append(row)
                weight = layer._parameters[param]
                if row.path == "merged" and weight is not None and weight.element_size() < 4:
                    rounded.append(f"{name}: W + dW in {weight.dtype} loses most of a small dW")
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        result.trainable += size if parameter.requires_grad else 0
        if id(parameter) in deltas:
            result.adapter_params += size
            result.adapter_frozen += 0 if parameter.requires_grad else size
            continue
        result.total += size
        if parameter.requires_grad:
            result.in_place.append(name)
    result.warnings = (
        ([] if example is None else _unused(result, seen))
        + rounded
        + [
            f"{row.layer}: its delta has {row.params:,} parameters, its weight {row.full_params:,}"
            for row in result.rows
            if row.params > row.full_params
        ]
    )
    return result


def _unused(summary: Summary, seen: dict[str, Seen]) -> list[str]:
    """Layers that a forward passed by: some models read ``layer.weight`` and never call it."""
    called = [row for row in summary.rows if row.kind not in ("attention", "parameter")]
    return [
        f"{row.layer} was not called in the forward: its delta has no effect. Exclude it"
        for row in called
        if row.layer not in seen
    ]


def measure(model: nn.Module, example: Any) -> tuple[int, dict[str, Seen]]:
    """Runs one forward and returns the bytes kept for backward, and what each layer was given."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their addresses from being reused

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    args = example if isinstance(example, tuple) else (example,)
    seen: dict[str, Seen] = {}

    def count(name: str, layer: Adapted, x: Tensor) -> None:
        adapters = layer.adapters
        deltas = (delta for adapter in adapters for _, delta in adapters[adapter].items())
        seen[name] = rows_of(layer, x, next(deltas)), compute_dtype(x)

    with watched(model, count), untouched(model), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(*args)
        del output
    return sum(t.untyped_storage().nbytes() for t in kept.values()), seen


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward in training moves: running statistics and random states."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _row(
    name: str, layer: nn.Module, adapter: str, param: str, delta: Delta, seen: Seen | None
) -> Row:
    info = delta.info
    ranks = delta.ranks()
    weight = layer._parameters[param]
    assert weight is not None
    per_mode = len(ranks) == len(info.shape)
    rank = max(ranks[info.out_dim], ranks[info.in_dim]) if per_mode else ranks[0]
    rows, dtype = seen or (MANY_ROWS, weight.dtype)
    total, step = Total([(delta, 1.0)]), stride(layer)
    choice = Choice(total, rows, weight, layer.training, True, dtype, step)
    return Row(
        layer=name,
        adapter=adapter,
        param=param,
        kind=info.kind,
        shape=info.shape,
        ranks=ranks,
        clamped=delta.clamped,
        params=sum(p.numel() for p in delta.parameters()),
        full_params=weight.numel(),
        path=choose(choice),
        timed=forced(choice) is None and timed(choice) is not None,
        lora_params=conv_parameter_counts(info, rank),
    )


def _adapter_tag(row: Row) -> str:
    return "" if row.adapter == "default" else f" [{row.adapter}]"


def text_table(head: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table whose columns are as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in (head, *body)
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]

"""Which weights of a model get a delta.

A target is one of

- a glob on full dotted names, which also matches as a dotted suffix: ``stages.*``, ``mlp.fc1``;
- ``re:`` and a regular expression that matches the full dotted name of a layer;
- a layer class;
- a keyword: ``linear`` (also 1x1 convolutions), ``conv`` (kernels beyond 1x1), ``depthwise``,
  ``embedding``, ``attention`` (the projections of nn.MultiheadAttention), ``all`` (each of these
  but embeddings);
- the dotted name of a raw parameter, whose last part is spelt out: ``*.experts.gate_up``.

Every target must match something.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Kind, WeightInfo
from .errors import AdapterError
from .layers import Adapted
from .ops import CONVS, TRANSPOSED, is_conv1d, op_of
from .tuning import Target

KEYWORDS: dict[str, tuple[Kind, ...]] = {
    "linear": ("linear",),
    "conv": ("conv",),
    "depthwise": ("depthwise",),
    "embedding": ("embedding",),
    "attention": ("attention",),
    "all": ("linear", "conv", "depthwise", "attention"),
}
# What libraries without timm's `get_classifier` call the task head of a model.
HEADS = ("head", "heads", "fc", "classifier", "lm_head")
_MHA_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Candidate:
    """A weight that could get a delta.

    Attributes:
        layer: Dotted name of the owning module.
        module: The owning module.
        param: The parameter's own name.
        info: The weight, as its delta sees it.
    """

    layer: str
    module: nn.Module
    param: str
    info: WeightInfo

    @property
    def names(self) -> tuple[str, str]:
        """The names that a pattern can match: the layer's and the parameter's."""
        return self.layer, self.info.name


def candidates(model: nn.Module) -> list[Candidate]:
    """Every weight of ``model`` that could get a delta, in the model's own order."""
    found = []
    inside_attention = {
        id(module.out_proj)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    for name, module in model.named_modules():
        if ".adapters." in f".{name}.":
            continue
        for param, weight in module._parameters.items():
            if weight is not None and weight.dim() >= 2:
                info = _describe(name, module, param, weight, id(module) in inside_attention)
                found.append(Candidate(name, module, param, info))
    return found


def select(
    pool: Sequence[Candidate], targets: Iterable[Target], what: str = "targets"
) -> list[Candidate]:
    """The candidates that any target names; raises if a target names none."""
    chosen: set[int] = set()
    for target in targets:
        hits = {i for i, candidate in enumerate(pool) if matches(target, candidate)}
        if not hits:
            raise AdapterError(_nothing_matched(target, pool, what))
        chosen |= hits
    return [candidate for i, candidate in enumerate(pool) if i in chosen]


def matches(target: Target, candidate: Candidate) -> bool:
    """Whether one target names one candidate."""
    is_layer = candidate.info.kind != "parameter"
    if isinstance(target, type):
        base = getattr(type(candidate.module), "_litflora_base", type(candidate.module))
        return is_layer and issubclass(base, target)
    if not isinstance(target, str):
        raise AdapterError(f"a target is a pattern, a keyword or a layer class, not {target!r}")
    if target in KEYWORDS:
        return candidate.info.kind in KEYWORDS[target]
    if target.startswith("re:"):
        return is_layer and _regex(target).fullmatch(candidate.layer) is not None
    if is_layer and _glob(target, candidate.layer):
        return True
    # A trailing wildcard means layers: it must not sweep up position embeddings and the like.
    spelt_out = not set("*?[") & set(target.rpartition(".")[2])
    return spelt_out and _glob(target, candidate.info.name)


def _regex(target: str) -> re.Pattern[str]:
    try:
        return re.compile(target[3:])  # cached by re
    except re.error as error:
        raise AdapterError(f"'{target}' is no regular expression: {error}") from None


def match_names(pattern: str, names: Iterable[str]) -> list[str]:
    """The dotted names that a glob matches, whole or as a suffix."""
    return [name for name in names if _glob(pattern, name)]


def _glob(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def head_names(model: nn.Module) -> list[str]:
    """Dotted names of the task head: it is trained, never adapted."""
    names = {id(module): name for name, module in model.named_modules()}
    get_classifier = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        heads: Any = get_classifier()
        heads = heads if isinstance(heads, (tuple, list)) else [heads]
        return [names[id(head)] for head in heads if id(head) in names]
    return [name for name, _ in model.named_children() if name in HEADS]


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a dotted name is one of ``modules`` or lies below one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def refuse_lazy(model: nn.Module) -> None:
    """Raises if a parameter has no shape yet: torch itself cannot freeze it."""
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise AdapterError(f"{name} has no shape yet: run one forward before inject")


def refuse_unusable(candidate: Candidate, model: nn.Module) -> None:
    """Raises if a delta on this weight would be wrong or without effect."""
    weight, module = candidate.module._parameters[candidate.param], candidate.module
    name = candidate.info.name
    assert weight is not None
    if "forward" in vars(module):
        raise AdapterError(
            f"the forward of {candidate.layer} was replaced on the object, which would pass the "
            "delta by: inject before dispatching or patching, or exclude that layer"
        )
    if not weight.is_floating_point():
        raise AdapterError(
            f"{name} is stored as {weight.dtype}: only floating-point bases are adapted"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise AdapterError(
            f"{name} is rescaled by max_norm at each look-up: set max_norm=None first"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise AdapterError(f"{candidate.layer} is a scripted module: inject before scripting")
    if candidate.param != "weight" and isinstance(getattr(module, "weight", None), Tensor):
        raise AdapterError(
            f"the weight of {candidate.layer} is computed from {name} by a hook: make it permanent "
            "first (prune.remove, remove_weight_norm)"
        )
    if not isinstance(module, Adapted) and hasattr(module, "adapters"):
        raise AdapterError(
            f"{candidate.layer} has an attribute `adapters` already: exclude that layer"
        )
    for other_name, other in model.named_modules():
        if other is not module and any(p is weight for p in other._parameters.values()):
            raise AdapterError(
                f"{name} is tied to a weight of {other_name}: a delta would change the one and, "
                f"merged, both. Untie them, or exclude=[{candidate.layer!r}]"
            )


def _describe(
    layer: str, module: nn.Module, param: str, weight: Tensor, attention: bool
) -> WeightInfo:
    kind, out_dim, groups, has_side = _kind(module, param, weight, attention)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    shape = tuple(weight.shape)
    stacked = kind == "parameter" and len(shape) > 2  # matrices, by rows and columns
    return WeightInfo(
        name=f"{layer}.{param}".lstrip("."),
        shape=shape,
        kind=kind,
        out_dim=len(shape) - 2 if stacked else out_dim,
        in_dim=len(shape) - 1 if stacked else 1 - out_dim,
        groups=groups,
        padding_idx=module.padding_idx if isinstance(module, nn.Embedding) else None,
        has_side=has_side,
        dtype=torch.promote_types(dtype, torch.float32),
        device=weight.device,
    )


def _kind(
    module: nn.Module, param: str, weight: Tensor, attention: bool
) -> tuple[Kind, int, int, bool]:
    """Kind, output mode, groups, and whether there is a side path."""
    base = getattr(type(module), "_litflora_base", type(module))
    if isinstance(module, nn.MultiheadAttention) and param in _MHA_WEIGHTS:
        return "attention", 0, 1, False
    if param != "weight":
        return "parameter", 0, 1, False
    known = op_of(base) is not None
    if isinstance(module, nn.Linear):
        return ("attention" if attention else "linear"), 0, 1, known and not attention
    if isinstance(module, nn.Embedding):
        return "embedding", 1, 1, known and not module.scale_grad_by_freq
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        out_dim = int(isinstance(module, TRANSPOSED))
        return _conv_kind(module), out_dim, module.groups, known
    if is_conv1d(base):
        return "linear", 1, 1, True
    return "parameter", 0, 1, False


def _conv_kind(module: nn.Module) -> Kind:
    assert isinstance(module, (*CONVS, *TRANSPOSED))
    if module.groups > 1 and module.groups == module.in_channels:
        return "depthwise"
    pointwise = module.groups == 1 and all(size == 1 for size in module.kernel_size)
    return "linear" if pointwise else "conv"


def _nothing_matched(target: Target, pool: Sequence[Candidate], what: str) -> str:
    shown = target.__name__ if isinstance(target, type) else target
    if isinstance(target, type) or target in KEYWORDS:
        kinds = sorted({candidate.info.kind for candidate in pool})
        return f"{what}: no layer is {shown!r}; this model has: {', '.join(kinds) or 'no layers'}"
    if "," in target and not target.startswith("re:"):
        return f"{what}: '{shown}' is one pattern: give several as a list, [{shown}]"
    names = sorted({name for candidate in pool for name in candidate.names})
    return f"{what}: '{shown}' matches no layer. {nearest(shown, names)}"


def nearest(name: str, names: Sequence[str], count: int = 3) -> str:
    """A sentence with the names nearest to a misspelt one."""
    # Patterns are mostly suffixes, so every suffix of a name is a thing one may have meant.
    suffixes = {suffix: full for full in names for suffix in _suffixes(full)}
    close = difflib.get_close_matches(name, list(suffixes), n=count, cutoff=0.5)
    if not close:
        return f"There is, for example: {', '.join(list(names)[:count])}"
    return f"Nearest: {', '.join(dict.fromkeys(close))}"


def _suffixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))

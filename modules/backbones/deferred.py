"""Backbones built without their weights, of which each process later reads the part it holds.

Parameters are on the meta device until `fill`; buffers, heads and deltas are real from the
start. timm loads a weights file as it always does, translating names and layouts, but into nothing:
what it would have put where is noted, and read from the file when the network has been shared out.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors.torch
import timm
import torch
from safetensors.torch import _TYPES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..adapters.sharded import rows_of

_RANDOM = ("aten.normal_.default", "aten.uniform_.default")


@dataclass(frozen=True)
class Source:
    """Where the values of a parameter are.

    Attributes:
        values: The values, if they are not in a file as they are.
        path: The file.
        start: Their first byte in it.
        dtype: Their type in the file.
        shape: Their shape.
    """

    values: Tensor | None
    path: str = ""
    start: int = 0
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensor: Tensor, files: dict[int, str]) -> Source:
        """The source of a tensor, which is remembered by its place in a file if it is mapped.

        Args:
            tensor: The tensor.
            files: The files that are mapped, by the address of their first byte.
        """
        begin = tensor.untyped_storage().data_ptr()
        if begin not in files or not tensor.is_contiguous():
            return cls(tensor.clone())
        start = tensor.data_ptr() - begin
        return cls(None, files[begin], start, tensor.dtype, tuple(tensor.shape))

    def read(self, first: int, count: int) -> Tensor:
        """Some rows; only their pages of the file are read, and none stays mapped by this."""
        if self.values is not None:
            return self.values[first : first + count]
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        start = self.start + first * row
        mapped = _mapped(self.path)[start : start + count * row]
        return mapped.view(self.dtype).view(count, *self.shape[1:])


@dataclass
class Deferred:
    """Parameters that were built without memory, and where their values are.

    Attributes:
        sources: By parameter.
        files: The files that are mapped while a model is built, by the address of their first byte.
    """

    sources: dict[nn.Parameter, Source] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)

    def by_name(self, net: nn.Module) -> dict[str, Source]:
        """The sources of all parameters of a network that have no memory.

        Raises:
            RuntimeError: There is one whose values are nowhere.
        """
        empty = {name: p for name, p in net.named_parameters() if p.is_meta}
        for name, parameter in empty.items():
            if parameter not in self.sources:
                raise RuntimeError(f"{name} was built without values")
        return {name: self.sources[parameter] for name, parameter in empty.items()}

    def note(self, net: nn.Module, state: dict[str, Tensor]) -> None:
        """Remembers where a state dict has the values of parameters without memory."""
        own = dict(net.named_parameters(remove_duplicate=False))
        for key, value in state.items():
            if key in own and own[key].is_meta:
                self.sources[own[key]] = Source.of(value, self.files)

    def load_file(self, path: str | Path, device: Any = "cpu") -> dict[str, Tensor]:
        """Does what safetensors' function does, but that pages are read when touched."""
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        mapped = _mapped(path)
        self.files[mapped.data_ptr()] = str(path)
        return {key: _entry(mapped[8 + size :], entry) for key, entry in header.items()}


_deferred: ContextVar[Deferred | None] = ContextVar("deferred", default=None)


@contextmanager
def deferring(wanted: bool = True) -> Iterator[Deferred]:
    """Inside, timm models with weights of a file or of the hub are built without them.

    Yields:
        What is to fill them; of nothing if it is not ``wanted``.
    """
    waiting = Deferred()
    token = _deferred.set(waiting if wanted else None)
    try:
        yield waiting
    finally:
        _deferred.reset(token)


def deferred() -> Deferred | None:
    """What the weights are left to, inside of `deferring`; else None."""
    return _deferred.get()


def create_model(name: str, **options: Any) -> nn.Module:
    """Makes a timm model with pretrained weights, which inside `deferring` are for later.

    Raises:
        ValueError: The weights are in a layout that timm reads by itself, not as a state dict.
    """
    waiting = deferred()
    if waiting is None:
        return timm.create_model(name, pretrained=True, **options)
    load = nn.Module.load_state_dict

    def note(net: nn.Module, state: Any, *args: Any, **kwargs: Any) -> Any:
        waiting.note(net, state)
        return load(net, state, *args, **kwargs)  # which checks names and shapes, and fills buffers

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        stack.enter_context(parameters_on_meta())
        stack.enter_context(_Drawing())
        stack.enter_context(patch.object(nn.Module, "load_state_dict", note))
        stack.enter_context(patch.object(safetensors.torch, "load_file", waiting.load_file))
        net = timm.create_model(name, pretrained=True, **options)
    waiting.files.clear()
    named = net.named_parameters()
    lost = [name for name, p in named if p.is_meta and p not in waiting.sources]
    classifier = net.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    if all(key.rpartition(".")[0] in heads for key in lost):
        for head in heads if lost else ():  # nobody has trained it for these classes
            give_memory(net.get_submodule(head))
        return net
    raise ValueError(
        f"the weights of {name} lack {lost[0]}, or are no state dict: save them as .safetensors "
        "from a model that has loaded them, and give that file as weights"
    )


def give_memory(layer: nn.Module) -> None:
    """Starts a layer afresh whose parameters have no memory: timm makes it where the others are."""
    if any(p.is_meta for p in layer.parameters()):
        layer.to_empty(device="cpu")
        layer.reset_parameters()


def _entry(data: Tensor, entry: dict[str, Any]) -> Tensor:
    """One tensor of a file's data, from what the file's header says of it."""
    start, end = entry["data_offsets"]
    dtype = _TYPES[entry["dtype"]]
    raw = data[start:end]
    aligned = raw.storage_offset() % dtype.itemsize == 0
    return (raw if aligned else raw.clone()).view(dtype).view(entry["shape"])


def _mapped(path: str | Path) -> Tensor:
    storage = torch.UntypedStorage.from_file(str(path), False, Path(path).stat().st_size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


@torch.no_grad()
def fill(net: nn.Module, sources: Mapping[str, Source], device: torch.device) -> None:
    """Gives memory to every parameter that has none, and reads what this process holds of it.

    Args:
        net: The network, sharded (FSDP2) or not.
        sources: Where the values of these parameters are, by name.
        device: Where they are put.
    """
    tied = _tied(net)
    net._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    for name, first in tied.items():  # each of the two has got memory of its own
        parent, _, own = name.rpartition(".")
        setattr(net.get_submodule(parent), own, net.get_parameter(first))
    for name, source in sources.items():
        _read_into(net.get_parameter(name), source)


def _tied(net: nn.Module) -> dict[str, str]:
    """The names of parameters that have another name, too, with the first one that they have."""
    first: dict[nn.Parameter, str] = {}
    named = net.named_parameters(remove_duplicate=False)
    return {n: first[p] for n, p in named if first.setdefault(p, n) != n}


def _read_into(parameter: Tensor, source: Source) -> None:
    if not hasattr(parameter, "to_local"):
        parameter.copy_(source.read(0, len(parameter)) if parameter.dim() else source.read(0, 1)[0])
        return
    first, count = rows_of(parameter)
    if count:
        parameter.to_local().copy_(source.read(first, count))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, what modules register as parameters goes to the meta device; buffers do not."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    with patch.object(nn.Module, "register_parameter", on_meta):
        yield


class _Drawing(TorchDispatchMode):
    """Draws the random numbers that a parameter without memory would get, and throws them away.

    A head that is made afterwards then starts with the numbers that it has in an ordinary run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._scratch = torch.empty(0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if str(func) in _RANDOM and args[0].is_meta:
            func(self._room(args[0]), *args[1:], **(kwargs or {}))
            return args[0]
        return func(*args, **(kwargs or {}))

    def _room(self, like: Tensor) -> Tensor:
        """A tensor to draw into; always in the same memory, which an allocator might not reuse."""
        if self._scratch.numel() < like.numel() or self._scratch.dtype != like.dtype:
            self._scratch = torch.empty(like.numel(), dtype=like.dtype)
        return self._scratch[: like.numel()].view(like.shape)

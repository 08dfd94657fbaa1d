"""A small whole model, and the check that an operation left a model exactly as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from litflora.adapters import FLoRA, LoRA, Tuning, inject

from .cases import randomize, with_deltas


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that an operation which raises, or one that is undone, must leave as it was."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        names = sorted(set(vars(module)) - {"_parameters", "_buffers", "_modules"})
        state[name] = (
            type(module),
            names,
            module.training,
            [len(getattr(module, h)) for h in hooks],
        )
    for name, tensor in model.state_dict(keep_vars=True).items():
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        state[f"tensor {name}"] = (
            tensor.requires_grad,
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            raw,
        )
    return state


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Assert that the block leaves types, attributes, hooks, flags and every bit of the model."""
    before = snapshot(model)
    yield
    after = snapshot(model)
    different = sorted(
        key for key in before.keys() | after.keys() if before.get(key) != after.get(key)
    )
    assert not different, f"changed: {different}"


class Net(nn.Module):
    """A small model with each kind of layer, a batch norm and a head."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.dw(F.gelu(self.norm(self.stem(x)))))
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.mlp(tokens)
        tokens = tokens + self.attn(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens.mean(1))


def net(dtype: torch.dtype = torch.float64, seed: int = 1) -> Net:
    """A `Net` from its own seed, in eval mode: the same base each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().to(dtype).eval()


def images(batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 3, 5, 5, dtype=torch.float64, generator=generator).to(dtype)


def base() -> Net:
    """The base as adapters leave it: frozen, by which torch also chooses how it rounds."""
    return net().requires_grad_(False)


def flora_net(name: str = "default", **options: Any) -> Net:
    model = net()
    inject(model, FLoRA(rank=3, targets="all"), name=name, **options)
    return randomize(model, name=name)


def two_adapters() -> Net:
    """Adapter "a" on everything and "b", LoRA on linears and the depthwise layer alone."""
    model = flora_net("a")
    inject(model, LoRA(rank=2, targets=["linear", "depthwise"]), name="b")
    return randomize(model, name="b")


def reference(model: nn.Module, weights: dict[str, float]) -> torch.Tensor:
    return with_deltas(net(), model, images(), weights=weights)


def trained(
    tuning: Tuning | None = None, train: tuple[str, ...] = ("head",), name: str = "default"
) -> Net:
    """A net whose adapter and head differ from their start."""
    model = net()
    inject(model, tuning or FLoRA(rank=3, targets="all"), name=name, train=train)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.4)
    return model


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert y.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

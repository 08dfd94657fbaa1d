"""What a training step costs with each tuning: time, bytes kept for backward, ratios to the peers.

    python benchmarks/step.py --model vit_small_patch16_224
    python benchmarks/step.py --layers

All variants of a model live in one process and take turns, up and down the list, so that whatever
else the machine does falls on all of them. Before anything is timed, the gradients of litflora's
variants are compared with those of W + dW under plain autograd, in float64. On a CPU the time is
that of the processor, on a GPU that between two events. Peers come with pip install -e '.[bench]'.
The table goes to the screen and, with a picture, to --out.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import shapes
import timm
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from litflora.adapters import FLoRA, LoRA, disabled, inject
from litflora.adapters.layers import adapted_layers
from litflora.adapters.summary import measure

CLASSES = 100
RANK = 8
MODELS = {  # batch, pixels
    "convnext_tiny": (8, 128),
    "convnext_large": (4, 128),
    "vit_small_patch16_224": (8, 224),
    "vit_large_patch14_clip_224": (2, 224),
    "vit_large_patch14_dinov2": (2, 224),
}


@dataclass
class Variant:
    """One way to train a model.

    Attributes:
        model: The model, ready to train.
        reaches_input: Whether gradients go down to the input, as for an adapter in the first layer.
    """

    model: nn.Module
    reaches_input: bool = False


# Ways to train ------------------------------------------------------------------------------------


def full(net: nn.Module) -> Variant:
    return Variant(net)


def probe(net: nn.Module) -> Variant:
    return Variant(frozen(net))


def floor(net: nn.Module) -> Variant:
    """The least that any adapter can cost: frozen layers, and the gradient down to the input."""
    return Variant(frozen(net), reaches_input=True)


def frozen(net: nn.Module) -> nn.Module:
    net.requires_grad_(False)
    net.get_classifier().requires_grad_(True)
    return net


def layers(net: nn.Module, kinds: set[str]) -> list[str]:
    """Names of the layers of some kinds: linear, dense (convolutions), depthwise; not the head."""
    head = {id(m) for m in net.get_classifier().modules()}
    return [
        name
        for name, module in net.named_modules()
        if id(module) not in head and kind_of(module) in kinds and not name.startswith("stem.")
    ]


def kind_of(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "dense" if module.groups == 1 else "depthwise"
    return ""


LINEAR, DENSE, ALL = {"linear"}, {"linear", "dense"}, {"linear", "dense", "depthwise"}


def ours(method: type, path: str = "auto", kinds: set[str] = LINEAR, **options: object) -> Callable:
    def make(net: nn.Module) -> Variant:
        tuning = method(rank=RANK, path=path, targets=layers(net, kinds), **options)
        head = next(n for n, m in net.named_modules() if m is net.get_classifier())
        inject(net, tuning, train=[head])
        return Variant(net)

    return make


def peft(kinds: set[str], dropout: float = 0.0) -> Callable:
    def make(net: nn.Module) -> Variant:
        from peft import LoraConfig, get_peft_model

        head = next(n for n, m in net.named_modules() if m is net.get_classifier())
        config = LoraConfig(
            r=RANK,
            lora_alpha=16,
            lora_dropout=dropout,
            target_modules=layers(net, kinds),
            modules_to_save=[head],
        )
        return Variant(get_peft_model(net, config))

    return make


def lycoris(net: nn.Module) -> Variant:
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"target_name": [*layers(net, ALL)]})
    wrapper = create_lycoris(
        net, 1.0, linear_dim=RANK, linear_alpha=RANK, algo="locon", use_tucker=True
    )
    wrapper.apply_to()
    frozen(net)
    wrapper.requires_grad_(True)
    net.lycoris = wrapper
    return Variant(net)


class TwoOps(nn.Module):
    """The article's own way: the layer, and beside it the whole operation again with dW."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        shape = layer.weight.shape
        ranks = [min(RANK, n) if i < 2 else min(2, n) for i, n in enumerate(shape)]
        self.core = nn.Parameter(torch.zeros(ranks))
        self.factors = nn.ParameterList(
            nn.Parameter(torch.randn(n, r) / n**0.5) for n, r in zip(shape, ranks, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Two operations of full size."""
        dense = self.core
        for factor in self.factors:  # each contracts the first mode and appends its own
            dense = torch.tensordot(dense, factor, dims=([0], [1]))
        if isinstance(self.layer, nn.Linear):
            return self.layer(x) + F.linear(x, dense)
        return self.layer(x) + self.layer._conv_forward(x, dense, None)


def two_ops(net: nn.Module) -> Variant:
    names = layers(net, ALL)
    frozen(net)
    for name in names:
        net.set_submodule(name, TwoOps(net.get_submodule(name)))
    return Variant(net)


def check(model: str, make: Callable[[nn.Module], Variant]) -> None:
    """Raises unless a variant's loss and gradients are those of W + dW, in float64."""
    torch.manual_seed(0)
    options = {"img_size": 56} if model.startswith("vit") else {}
    net = timm.create_model(model, num_classes=CLASSES, **options).double()
    make(net)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        nn.init.normal_(parameter, std=0.02)
    x = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    sums = {
        f"{name}.{param}": layer.get_parameter(param) + total(*total.tensors())
        for name, layer, adapters in adapted_layers(net)
        for param, total in adapters.applied().items()
    }
    with disabled(net):
        expected = torch.func.functional_call(net, sums, (x,))
    wanted = torch.autograd.grad(expected.square().sum(), list(trained.values()))
    found = torch.autograd.grad(net(x).square().sum(), list(trained.values()))
    for name, one, other in zip(trained, found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10 * other.abs().max(), msg=name)


VARIANTS: dict[str, Callable[[nn.Module], Variant]] = {
    "full": full,
    "probe": probe,
    "floor": floor,
    "PEFT LoRA, linear": peft(LINEAR),
    "PEFT LoRA, linear, dropout": peft(LINEAR, 0.1),
    "PEFT LoRA, linear + dense": peft(DENSE),
    "LyCORIS LoCon-Tucker, all": lycoris,
    "article's two operations, all": two_ops,
    "FLoRA side, linear": ours(FLoRA, "side"),
    "FLoRA rebuilt, linear": ours(FLoRA, "rebuilt"),
    "FLoRA merged, linear": ours(FLoRA, "merged"),
    "FLoRA auto, linear": ours(FLoRA),
    "LoRA auto, linear": ours(LoRA),
    "LoRA auto, linear, dropout": ours(LoRA, dropout=0.1),
    "FLoRA auto, linear + dense": ours(FLoRA, kinds=DENSE),
    "LoRA auto, linear + dense": ours(LoRA, kinds=DENSE),
    "FLoRA auto, all": ours(FLoRA, kinds=ALL),
}


# Measuring ----------------------------------------------------------------------------------------


class Stepper:
    """Takes training steps of one variant on one batch."""

    def __init__(self, variant: Variant, batch: int, size: int, device: str) -> None:
        self.model = variant.model.to(device).train()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch, 3, size, size, generator=generator).to(device)
        self.x.requires_grad_(variant.reaches_input)
        self.y = torch.arange(batch, device=device) % CLASSES
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def loss(self) -> Tensor:
        """The forward."""
        with self.autocast:
            return F.cross_entropy(self.model(self.x).float(), self.y)

    def step(self) -> None:
        """Forward, backward and optimizer."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.x.grad = None

    def saved(self) -> int:
        """Bytes that autograd keeps for backward, parameters left out."""
        with self.autocast:
            return measure(self.model, self.x)[0]

    def peak(self) -> int:
        """Bytes that a step allocates at most beyond what lives between steps; CUDA alone says."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        return torch.cuda.max_memory_allocated() - before


def seconds(stepper: Stepper, device: str) -> float:
    """Time of one step: of the processor on a CPU, which others share; of the stream on a GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        stepper.step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.process_time()
    stepper.step()
    return time.process_time() - begin


def alternate(steppers: dict[str, Stepper], repetitions: int, device: str) -> dict[str, float]:
    """The median time of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for stepper in steppers.values():
        stepper.step()
    for repetition in track(range(repetitions), description="repetitions"):
        order = list(steppers)[:: 1 if repetition % 2 == 0 else -1]
        for name in order:
            times[name].append(seconds(steppers[name], device))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(args: argparse.Namespace) -> str:
    batch, size = args.batch or MODELS[args.model][0], args.size or MODELS[args.model][1]
    for name in track(args.variants, description="checking"):
        if name.startswith(("FLoRA", "LoRA")) and "dropout" not in name:
            check(args.model, VARIANTS[name])
    steppers = {}
    for name in track(args.variants, description="building"):
        torch.manual_seed(0)
        options = {"img_size": size} if args.model.startswith("vit") else {}
        net = timm.create_model(args.model, num_classes=CLASSES, **options)
        steppers[name] = Stepper(VARIANTS[name](net), batch, size, args.device)
    saved = {name: stepper.saved() for name, stepper in steppers.items()}
    times = alternate(steppers, args.repetitions, args.device)
    peaks = {name: s.peak() for name, s in steppers.items()} if args.device == "cuda" else {}
    heads = ["variant", "trained", "ms", *(f"/ {each}" for each in ("full", "PEFT", "floor"))]
    heads += ["saved MiB", "/ full", "/ PEFT", *(["peak MiB", "/ PEFT"] if peaks else [])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, stepper in steppers.items():
        count = sum(p.numel() for p in stepper.model.parameters() if p.requires_grad)
        bases = ("full", "PEFT LoRA, linear", "floor")
        ratios = [ratio(times[name], times.get(base)) for base in bases]
        memory = [ratio(saved[name], saved.get(base)) for base in bases[:2]]
        cells = [name, f"{count / 1e6:.2f} M", f"{1000 * times[name]:.0f}", *ratios]
        cells += [f"{saved[name] / 2**20:.1f}", *memory]
        if peaks:
            cells += [f"{peaks[name] / 2**20:.1f}", ratio(peaks[name], peaks.get(bases[1]))]
        lines.append(f"| {' | '.join(cells)} |")
    draw(args, times, saved)
    title = f"{args.model}, {size} pixels, batch {batch}, rank {RANK}, {about(args)}"
    return "\n".join([title, "", *lines])


def draw(args: argparse.Namespace, times: dict[str, float], saved: dict[str, int]) -> None:
    """Two bars for each variant, relative to full tuning."""
    if "full" not in times:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 + 0.4 * len(times)), layout="constrained")
    axes, places = figure.subplots(), range(len(times))
    for shift, label, values in ((-0.2, "time", times), (0.2, "bytes kept for backward", saved)):
        heights = [values[name] / values["full"] for name in times]
        axes.barh([place + shift for place in places], heights, 0.38, label=label)
    if "floor" in times:
        axes.axvline(times["floor"] / times["full"], color="grey", linestyle=":", linewidth=1)
    axes.set(yticks=list(places), yticklabels=list(times), title=f"{args.model}, full tuning = 1")
    axes.invert_yaxis()
    axes.legend()
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / f"{args.model}_{args.device}.png", dpi=120)


def layer_table(args: argparse.Namespace) -> str:
    text = shapes.table(args.repetitions)
    return f"forward and backward relative to full tuning, {about(args)}\n\n{text}"


def ratio(value: float, base: float | None) -> str:
    return "" if base is None else f"{value / base:.2f}"


def about(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        return f"bf16 autocast, {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    return f"float32, {name} with {torch.get_num_threads()} threads, medians of {args.repetitions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224", choices=MODELS)
    parser.add_argument("--layers", action="store_true", help="single layers, by shape")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_step"))
    args = parser.parse_args()
    text = layer_table(args) if args.layers else compare(args)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{'layers' if args.layers else args.model}_{args.device}.md"
    path.with_suffix(".tmp").write_text(text + "\n")
    os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    main()

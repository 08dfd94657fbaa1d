"""What a training step of LLaVA-1.5 costs with litflora's adapters and with PEFT's.

    python benchmarks/llava_step.py             # 7 B of random weights in bf16: a GPU of 80 GB
    python benchmarks/llava_step.py --small     # a narrow model of the same kind, on a CPU too

The tower is frozen, the connector trains whole, and the linear layers of the language model are
adapted: frozen in bf16, or in NF4, both under bf16 autocast. One contestant after the other is
built and measured, all in one process. The table goes to the screen and to --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
from llava import llava_7b, small_llava
from rich.progress import track
from timing import alternate
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from litflora.adapters import FLoRA, LoRA, PerModule, Tuning, inject
from litflora.backbones import with_targets
from litflora.language.part_tunings import part_tunings
from litflora.language.pretrained import PretrainedNet
from litflora.nf4 import BLOCK, quantize

LANGUAGE_MODEL = "model.language_model"


def ours(model: nn.Module, tuning: Tuning, nf4: bool) -> nn.Module:
    """The model with deltas of litflora in its language model."""
    net = PretrainedNet(model)
    parts = part_tunings(net, "language_model", tuning)
    inject(net, with_targets(net, PerModule(parts)), train=net.parts()["connector"])
    if nf4:
        quantize(net, net.parts()["language_model"])
    return model


def peft(model: nn.Module, rank: int, nf4: bool) -> nn.Module:
    """The model with LoRA of PEFT in the same layers."""
    from peft import LoraConfig, get_peft_model

    if nf4:
        _hold_in_4_bits(model.get_submodule(LANGUAGE_MODEL))
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=r".*language_model\..*(_proj)",
        modules_to_save=["multi_modal_projector"],
    )
    return get_peft_model(model, config)


def _hold_in_4_bits(model: nn.Module) -> None:
    """What QLoRA's users train: bitsandbytes' own layers."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    options: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            sizes = layer.in_features, layer.out_features, layer.bias is not None
            held = Linear4bit(*sizes, compute_dtype=torch.bfloat16, **options)
            # It is quantised when it is moved.
            held.weight = Params4bit(layer.weight.detach().cpu(), blocksize=BLOCK, **options)
            model.set_submodule(name, held.to(layer.weight.device))


CONTESTANTS: dict[str, Callable[[nn.Module, bool], nn.Module]] = {
    "LoRA of PEFT, rank 128": lambda model, nf4: peft(model, 128, nf4),
    "LoRA, rank 128": lambda model, nf4: ours(model, LoRA(rank=128), nf4),
    "FLoRA, rank 64": lambda model, nf4: ours(model, FLoRA(rank=64), nf4),
}


@dataclass(frozen=True)
class Cost:
    """What a contestant costs.

    Attributes:
        trained: Parameters that train.
        seconds: Of a step.
        held: Bytes of weights and optimizer between steps.
        peak: Bytes at most within one; both None on a CPU.
    """

    trained: int
    seconds: float
    held: int | None
    peak: int | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a narrow model of two layers")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of an image and a text together")
    parser.add_argument("--repetitions", type=int, default=7)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_llava"))
    args = parser.parse_args()
    if args.device == "cpu" and not args.small:
        parser.error("7 B want a GPU: give --small for a model that a CPU can run")
    config = small_llava() if args.small else llava_7b()
    inputs = batch(config, args.batch, args.tokens, args.device)
    costs = {
        f"{name}, {base}": measure(config, partial(tune, nf4=base == "NF4"), inputs, args)
        for base in ("bf16", "NF4")
        for name, tune in track(CONTESTANTS.items(), description=f"base in {base}")
    }
    name = "small" if args.small else "7b"
    size = f"batch {args.batch}, {args.tokens} tokens"
    where = report.about(args.device, "bf16 autocast", args.repetitions)
    text = f"LLaVA-1.5, {name}, {size}, {where}\n\n{as_table(costs, args.batch * args.tokens)}"
    print(text)
    report.write(args.out / f"llava_{name}_{args.device}.md", text)


def batch(config: LlavaConfig, size: int, tokens: int, device: str) -> dict[str, Tensor]:
    """Conversations of noise, each about one image; all of the text is to be learnt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.image_token_index, (size, tokens), generator=generator)
    patches = config.vision_config.image_size // config.vision_config.patch_size
    ids[:, : patches**2] = config.image_token_index
    side = config.vision_config.image_size
    images = torch.randn(size, 3, side, side, generator=generator)
    labels = ids.masked_fill(ids == config.image_token_index, -100)
    inputs = {"input_ids": ids, "pixel_values": images.bfloat16(), "labels": labels}
    return {name: x.to(device) for name, x in inputs.items()}


def measure(
    config: LlavaConfig,
    tune: Callable[[nn.Module], nn.Module],
    inputs: dict[str, Tensor],
    args: argparse.Namespace,
) -> Cost:
    """Builds one contestant, and takes its steps."""
    model = build(config, tune, args.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16):
            model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    cuda = args.device == "cuda"
    seconds = alternate({"": step}, args.device, args.repetitions)[""]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if cuda else None
    step()
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return Cost(sum(p.numel() for p in trained), seconds, held, peak)


def build(config: LlavaConfig, tune: Callable[[nn.Module], nn.Module], device: str) -> nn.Module:
    """The model in bf16, tuned, its connector in float32 as all that trains."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.model.multi_modal_projector.float()
    return tune(model).to(device).train()


def as_table(costs: dict[str, Cost], tokens: int) -> str:
    """One line a contestant; times also in parts of the first one's of the same base."""
    heads = ["tuning", "trains", "step, ms", "of PEFT's", "tokens/s"]
    peaks = any(cost.peak is not None for cost in costs.values())
    return report.table([*heads, "held, MB", "peak, MB"] if peaks else heads, _rows(costs, tokens))


def _rows(costs: dict[str, Cost], tokens: int) -> list[list[str]]:
    rows, first = [], 0.0
    for name, cost in costs.items():
        first = cost.seconds if "PEFT" in name else first
        sizes = [f"{size / 1e6:,.0f}" for size in (cost.held, cost.peak) if size is not None]
        times = [f"{1000 * cost.seconds:,.0f}", report.ratio(cost.seconds, first)]
        rows.append([name, f"{cost.trained:,}", *times, f"{tokens / cost.seconds:,.0f}", *sizes])
    return rows


if __name__ == "__main__":
    main()

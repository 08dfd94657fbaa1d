"""What a step of AdamW costs by itself: torch's loop over parameters, `foreach`, and fused.

python benchmarks/optimizer.py --model vit_small_patch16_224
"""

from __future__ import annotations

import argparse
from copy import deepcopy

import report
import torch
from models import MODELS
from timing import alternate
from torch import nn
from variants import VARIANTS

KINDS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
TUNINGS = ("LoRA auto, linear", "FLoRA auto, linear", "full")


def optimizer(net: nn.Module, kind: str) -> torch.optim.Optimizer:
    """AdamW over what trains, with gradients to step by."""
    trained = [p for p in net.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW(trained, lr=1e-4, **KINDS[kind])


def table(model: str, device: str, repetitions: int) -> str:
    """Milliseconds of a step."""
    base, rows = MODELS[device][model].build(), []
    for tuning in TUNINGS:
        nets = {kind: VARIANTS[tuning](deepcopy(base)).to(device) for kind in KINDS}
        runs = {kind: optimizer(net, kind).step for kind, net in nets.items()}
        times = alternate(runs, device, repetitions)
        count = sum(p.requires_grad for p in nets["loop"].parameters())
        rows.append((tuning, str(count), *(f"{1000 * times[kind]:.2f}" for kind in KINDS)))
    return report.table(("tuning", "tensors", *(f"{kind}, ms" for kind in KINDS)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", default="vit_small_patch16_224", choices=MODELS["cpu"])
    parser.add_argument("--device", default=default, choices=MODELS)
    parser.add_argument("--repetitions", type=int, default=21)
    args = parser.parse_args()
    text = table(args.model, args.device, args.repetitions)
    where = report.about(args.device, "float32", args.repetitions)
    print(f"{args.model}, {where}\n\n{text}")


if __name__ == "__main__":
    main()

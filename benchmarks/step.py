"""What adapters cost: a training step with each tuning, single layers, and inference.

    python benchmarks/step.py --model vit_small_patch16_224
    python benchmarks/step.py --model vit_small_patch16_224 --inference
    python benchmarks/step.py --layers

All variants of a model live in one process and take turns, up and down the list, so that whatever
else the machine does falls on all of them. Before anything is timed, the gradients of litflora's
variants are compared with those of W + dW under plain autograd, in float64; for inference, the
outputs of all adapted models are. On a CPU the time is that of the processor, on a GPU that between
two events. Peers come with pip install -e '.[bench]'. The table goes to the screen and, with a
picture of a training step, to --out.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import inference
import shapes
import torch
import training
from models import MODELS, Model
from report import about, write
from variants import RANK, VARIANTS


def main() -> None:
    os.environ["LITFLORA_PATHS"] = "none"  # the rule is measured, not this machine's notes
    args = parse_args()
    name, text = args.table(args)
    print(text)
    write(args.out / f"{name}.md", text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224", choices=MODELS["cpu"])
    what = parser.add_mutually_exclusive_group()
    about_layers = "single layers on a CPU, or those whose name has NAME in it"
    what.add_argument("--layers", nargs="?", const="", metavar="NAME", help=about_layers)
    what.add_argument("--inference", action="store_true", help="forward alone, unmerged and merged")
    what.add_argument("--variants", nargs="+", choices=VARIANTS, help="all that suit the model")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int, help="pixels of a side, or tokens")
    parser.add_argument("--repetitions", type=int, help="7; 21 for inference and layers")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=MODELS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_step"))
    args = parser.parse_args()
    # Ratios close to one want more turns.
    close = args.inference or args.layers is not None
    args.repetitions = args.repetitions or (21 if close else 7)
    args.table = inference_table if args.inference else layer_table if close else step_table
    if args.layers and not shapes.named(args.layers):
        known = "; ".join(shape.name for shape in shapes.SHAPES)
        parser.error(f"no layer has {args.layers!r} in its name: {known}")
    suited = [name for name, v in VARIANTS.items() if v.suits(model_of(args).convolutional)]
    args.variants = args.variants or suited
    for name in args.variants:
        if name not in suited:
            parser.error(f"{name!r} adapts convolutions, which {args.model} has none of")
    return args


def model_of(args: argparse.Namespace) -> Model:
    model = MODELS[args.device][args.model]
    return replace(model, batch=args.batch or model.batch, size=args.size or model.size)


def step_table(args: argparse.Namespace) -> tuple[str, str]:
    """The name of its file, and the text."""
    model = model_of(args)
    costs = training.compare(model, args.variants, args.device, args.repetitions)
    name = f"{args.model}_{args.device}"
    training.draw(costs, args.model, args.out / f"{name}.png")
    return name, f"{title(args, model)}\n\n{training.table(costs)}"


def inference_table(args: argparse.Namespace) -> tuple[str, str]:
    """The name of its file, and the text."""
    model = model_of(args)
    text = inference.table(model, args.device, args.repetitions)
    return f"{args.model}_inference_{args.device}", f"{title(args, model)}\n\n{text}"


def layer_table(args: argparse.Namespace) -> tuple[str, str]:
    """The name of its file, and the text."""
    where = about("cpu", "float32", args.repetitions)
    text = shapes.table(shapes.named(args.layers), args.repetitions)
    name = "".join(c if c.isalnum() else "_" for c in f"layers_{args.layers}".rstrip("_"))
    return f"{name}_cpu", f"forward and backward relative to full tuning, {where}\n\n{text}"


def title(args: argparse.Namespace, model: Model) -> str:
    where = about(args.device, model.precision(args.device), args.repetitions)
    return f"{args.model}, {model}, rank {RANK}, {where}"


if __name__ == "__main__":
    main()

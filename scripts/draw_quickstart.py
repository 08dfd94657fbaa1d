"""Draws the README's picture: what the network calls scenes of the new style, before and after.

litflora fit --config quickstart
python scripts/draw_quickstart.py runs/quickstart/version_0/adapter docs/quickstart.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from litflora.backbones import create
from litflora.datamodules import ShapesDataModule
from litflora.module import from_adapter

ROWS, COLUMNS = 2, 7
RIGHT, WRONG = "#1a7f37", "#cf222e"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    module = from_adapter(args.adapter)
    module.configure_model()
    module.eval()
    data = ShapesDataModule(domain="shifted", test_samples=1000)
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    after = module(images).argmax(1)
    base = create("convnext_shapes", "embedded", data.num_classes).eval()
    before = base(module.normalize(images)).argmax(1)
    figure = draw(images, labels, before, after, data.class_names)
    figure.savefig(args.out, bbox_inches="tight")


def draw(images, labels, before, after, names: list[str]) -> Figure:
    figure = Figure(figsize=(1.5 * COLUMNS, 2.1 * ROWS), dpi=120)
    for i, axes in enumerate(figure.subplots(ROWS, COLUMNS).flat):
        axes.imshow(images[i].permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.axis("off")
        lines = (("before", before[i]), ("after", after[i]))
        for line, (when, predicted) in enumerate(lines):
            colour = RIGHT if predicted == labels[i] else WRONG
            text = f"{when}: {names[int(predicted)]}"
            height = -0.12 - 0.15 * line
            axes.text(0.5, height, text, transform=axes.transAxes, ha="center", color=colour)
    return figure


if __name__ == "__main__":
    main()

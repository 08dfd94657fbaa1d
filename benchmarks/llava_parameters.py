"""What adapters of LLaVA-1.5-7B train, by its configuration alone: no weights, no memory.

python benchmarks/llava_parameters.py
"""

from __future__ import annotations

import argparse

import report
import torch
from llava import llava_7b
from transformers import LlavaForConditionalGeneration

from litflora.adapters import FLoRA, LoRA, PerModule, Tuning, inject
from litflora.adapters.targets import is_inside
from litflora.backbones import with_targets
from litflora.language.part_tunings import part_tunings
from litflora.language.pretrained import PretrainedNet

TUNINGS = (LoRA(rank=128), FLoRA(rank=64))


def on_meta() -> PretrainedNet:
    """LLaVA-1.5-7B on the meta device."""
    with torch.device("meta"):
        return PretrainedNet(LlavaForConditionalGeneration(llava_7b()))


def trained(net: PretrainedNet, tuning: Tuning) -> dict[str, int]:
    """Parameters that train in each part: deltas at the default targets, the connector whole."""
    parts = net.parts()
    found: dict[str, Tuning] = {}
    for part in ("tower", "language_model"):
        found |= part_tunings(net, part, tuning)
    inject(net, with_targets(net, PerModule(found)), train=parts["connector"])
    sizes = {name: p.numel() for name, p in net.named_parameters() if p.requires_grad}
    return {
        part: sum(size for name, size in sizes.items() if is_inside(name, names))
        for part, names in parts.items()
    }


def table() -> str:
    """A row for each tuning; megabytes are those of the adapter's folder, in float32."""
    rows = []
    for tuning in TUNINGS:
        net = on_meta()
        whole = sum(p.numel() for p in net.parameters())
        counts = trained(net, tuning)
        every = sum(counts.values())
        rows.append(
            (
                f"{type(tuning).__name__}, rank {tuning.rank}",
                *(f"{count:,}" for count in counts.values()),
                f"{every:,}",
                f"{100 * every / whole:.2f} %",
                f"{4 * every / 1e6:,.0f}",
            )
        )
    parts = ("tower", "connector, whole", "language model")
    return report.table(("tuning", *parts, "all that trains", "of the model", "MB"), rows)


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(table())


if __name__ == "__main__":
    main()

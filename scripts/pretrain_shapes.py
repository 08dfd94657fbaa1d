"""Remake the weights of the embedded ConvNeXt: train it on the Shapes source domain.

python scripts/pretrain_shapes.py    # about four minutes on two cores
"""

import argparse
import os
from pathlib import Path

import timm
import torch
from rich.progress import track
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from litflora.backbones.embedded import WEIGHTS
from litflora.datamodules import ShapesDataModule

SEED = 1  # the recipes draw their scenes from seed 0: the network has seen none of them
BATCH_SIZE = 32
PEAK_LR = 4e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    net = timm.create_model("convnext_shapes", num_classes=10)
    train(net, args.samples, args.epochs)
    accuracies = {domain: accuracy(net, domain) for domain in ("source", "shifted")}
    metadata = {
        "command": f"python scripts/pretrain_shapes.py --samples {args.samples} "
        f"--epochs {args.epochs}",
        **{f"{domain}_accuracy": f"{value:.4f}" for domain, value in accuracies.items()},
    }
    unfinished = args.out.with_suffix(".tmp")
    unfinished.write_bytes(save(net.state_dict(), metadata))  # save_file lets only its owner read
    os.replace(unfinished, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {metadata}")


def train(net: nn.Module, samples: int, epochs: int) -> None:
    sizes = {"train_samples": samples, "val_samples": 1, "batch_size": BATCH_SIZE}
    data = ShapesDataModule("source", **sizes, seed=SEED)
    data.setup("fit")
    loader = data.train_dataloader()
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_LR, weight_decay=0.05)
    schedule = OneCycleLR(optimizer, PEAK_LR, total_steps=epochs * len(loader))
    net.train()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for images, labels in track(loader, f"epoch {epoch + 1}/{epochs}"):
            loss = F.cross_entropy(net(normalize(images)), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.inference_mode()
def accuracy(net: nn.Module, domain: str) -> float:
    data = ShapesDataModule(domain)
    data.setup("test")
    net.eval()
    hits = [net(normalize(images)).argmax(1) == labels for images, labels in data.test_dataloader()]
    return torch.cat(hits).float().mean().item()


def normalize(images: Tensor) -> Tensor:
    """Mean and deviation 0.5, as the network's configuration states."""
    return images / 127.5 - 1


if __name__ == "__main__":
    main()

"""The engine in other people's code: a plain loop, and a LightningModule that knows it not."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from litflora.adapters import FLoRA, inject, load, merge, save


def make_net() -> nn.Module:
    torch.manual_seed(0)  # stands for "read the pretrained weights"
    body = [nn.Conv2d(3, 16, 3, stride=2), nn.GELU(), nn.Conv2d(16, 16, 3, groups=16), nn.GELU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))


class SomeonesModule(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


images = torch.randn(64, 3, 16, 16)
loader = DataLoader(TensorDataset(images, (images.mean((1, 2, 3)) > 0).long()), batch_size=16)

net = make_net()
print(inject(net, FLoRA(rank=4, targets=["conv", "depthwise"]), train=["6"]))
optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=1e-2)
for x, y in loader:
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
save(net, "plain_adapter")

module = SomeonesModule(make_net())
inject(module.net, FLoRA(rank=4, targets=["conv", "depthwise"]), train=["6"])
Trainer(max_epochs=1, logger=False, enable_checkpointing=False).fit(module, loader)
merge(module.net, unload=True)  # a plain network again

again = make_net()
load(again, "plain_adapter")
assert torch.equal(again(images), net(images))

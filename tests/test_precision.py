"""A base in half precision: what is held so, and what it takes."""

import pytest
import torch
from tiny import Colours, module, save_base, trainer
from torch import nn

from litflora import from_adapter
from litflora.adapters import DoRA, FLoRA
from litflora.callbacks import AdapterFolder


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path)


def test_frozen_layers_alone_are_half(base, tmp_path):
    made = module(base, tuning=FLoRA(rank=2), base_dtype="bfloat16", lr_scheduler=None)
    start = module(base, tuning=FLoRA(rank=2), lr_scheduler=None)
    start.configure_model()
    trainer(tmp_path, precision="bf16-mixed").fit(made, Colours())
    own = dict(start.named_parameters())
    halves = set()
    for name, parameter in made.named_parameters():
        if parameter.dtype == torch.float32:
            continue
        halves.add(name)
        assert not parameter.requires_grad
        assert torch.equal(parameter, own[name].bfloat16()), name
    layers = [n for n, m in made.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    frozen = {n for n, p in made.named_parameters() if not p.requires_grad}
    assert halves == {n for n in frozen if n.rpartition(".")[0] in layers}
    assert sum(own[n].numel() for n in halves) > 0.8 * sum(own[n].numel() for n in frozen)


def test_magnitudes_of_dora_take_no_half_precision(base, tmp_path):
    made = module(base, tuning=DoRA(rank=2))
    with pytest.raises(ValueError, match="bf16-true is too coarse for DoRA's magnitudes"):
        trainer(tmp_path, precision="bf16-true").fit(made, Colours())


def test_it_needs_mixed_precision(base, tmp_path):
    made = module(base, base_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"needs trainer\.precision bf16-mixed, not 32-true"):
        trainer(tmp_path).fit(made, Colours())


def test_the_adapter_is_one_of_the_base_in_the_file(base, tmp_path):
    made = module(base, tuning=FLoRA(rank=2), base_dtype="bfloat16")
    run = trainer(tmp_path, precision="bf16-mixed", callbacks=[AdapterFolder()], max_epochs=3)
    run.fit(made, Colours(root=str(tmp_path)))
    again = from_adapter(tmp_path / "adapter")
    again.configure_model()
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    x = torch.rand(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = made.eval()(x)
    torch.testing.assert_close(again.eval()(x), expected.float(), atol=0.05, rtol=0.05)

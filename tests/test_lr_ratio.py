"""LoRA+: B learns faster than A, whatever else the rates of a layer follow."""

from functools import partial

import pytest
import torch
from lightning.pytorch import seed_everything
from tiny import Colours, module, save_base, trainer
from torch import nn
from torch.optim import SGD, AdamW

from litflora.adapters import AdapterError, FLoRA, LoRA, Parts, PerModule, PiSSA, inject, load, save
from litflora.optim import build_optimizer

RATIO = 16.0


def rates(net, **options):
    """The learning rate of each parameter that trains, and the names of the groups."""
    optimizer = build_optimizer(partial(SGD, lr=1.0), net, ["head"], **options)
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: found[id(p)] for name, p in net.named_parameters() if p.requires_grad}
    return named, {group["name"] for group in optimizer.param_groups}


def words():
    torch.manual_seed(0)
    layers = {"embed": nn.Embedding(7, 6), "conv": nn.Conv1d(6, 6, 3), "dense": nn.Linear(6, 4)}
    return nn.ModuleDict(layers)


def test_rates_are_those_of_peft():
    peft = pytest.importorskip("peft")
    optimizers = pytest.importorskip("peft.optimizers")
    targets = ["embed", "conv", "dense"]
    theirs = peft.get_peft_model(words(), peft.LoraConfig(r=2, target_modules=targets))
    made = optimizers.create_loraplus_optimizer(
        theirs, SGD, lr=1.0, loraplus_lr_ratio=RATIO, loraplus_lr_embedding=1.0
    )
    peft_rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    inject(ours := words(), LoRA(rank=2, targets=targets, lr_ratio=RATIO))
    found, groups = rates(ours)
    assert groups == {"adapters", "adapters_x16"}
    expected = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            layer, factor = name.split(".")[2], name.split("lora_")[1].replace("embedding_", "")[0]
            expected[f"{layer}.adapters.default.weight.lora_{factor}"] = peft_rates[id(parameter)]
    assert found == expected
    assert len(found) == 6
    assert sorted(found.values()) == [1.0] * 4 + [RATIO] * 2


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path)


def built(base, **settings):
    made = module(base, **settings)
    made.configure_model()
    return made.net


@pytest.mark.parametrize("kind", [LoRA, PiSSA])
def test_layer_decay_and_the_ratio_multiply(base, kind):
    plain, _ = rates(built(base, tuning=kind(rank=2)), layer_decay=0.5)
    found, _ = rates(built(base, tuning=kind(rank=2, lr_ratio=RATIO)), layer_decay=0.5)
    assert found == {n: RATIO * r if n.endswith("lora_B") else r for n, r in plain.items()}
    assert len({rate for name, rate in plain.items() if name.endswith("lora_B")}) > 1


def test_each_module_has_the_ratio_of_its_own_tuning(base):
    parts = {"blocks.0": LoRA(rank=2, lr_ratio=RATIO), "blocks.1": FLoRA(rank=2)}
    net = built(base, tuning=PerModule({**parts, "head": LoRA(rank=2, lr_ratio=4.0)}))
    options = {"factors": {"blocks.1": 5.0}, "rates": {"blocks.0": 0.1}}
    for head_lr, head in ((None, 1.0), (0.3, 0.3)):
        found, groups = rates(net, head_lr=head_lr, **options)
        told = {"adapters_lr0.1", "adapters_x16_lr0.1", "adapters_x5"}
        assert groups >= told | {"head_adapters", "head_adapters_x4"}
        for name, rate in found.items():
            if name.startswith("blocks.0"):
                assert rate == pytest.approx(0.1 * (RATIO if name.endswith("lora_B") else 1.0))
            elif "head.adapters" in name:
                assert rate == pytest.approx(head * (4.0 if name.endswith("lora_B") else 1.0))
            elif name.startswith("blocks.1"):
                assert rate == 5.0


def test_parts_of_fused_weights_have_the_ratio(base):
    parts = {"*.qkv": Parts(3, [0, 2])}
    net = built(base, tuning=LoRA(rank=2, targets="*.qkv", parts=parts, lr_ratio=RATIO))
    found, _ = rates(net)
    told = [rate for name, rate in found.items() if name.endswith("lora_B")]
    assert told
    assert set(told) == {RATIO}


def test_a_saved_adapter_keeps_the_ratio(tmp_path):
    inject(net := words(), LoRA(rank=2, targets="dense", lr_ratio=RATIO))
    save(net, tmp_path)
    load(again := words(), tmp_path)
    assert rates(again) == rates(net)


def test_a_resumed_run_goes_on_bit_for_bit(base, tmp_path):
    tuning = PiSSA(rank=2, lr_ratio=RATIO)

    def fit(epochs, ckpt_path=None):
        seed_everything(3)
        run = trainer(tmp_path, max_epochs=epochs, limit_train_batches=2)
        made = module(base, tuning=tuning, optimizer=partial(AdamW, lr=1e-3), lr_scheduler=None)
        run.fit(made, Colours(), ckpt_path=ckpt_path, weights_only=True)
        return made.state_dict(), run

    _, first = fit(1)
    first.save_checkpoint(path := tmp_path / "one.ckpt")
    (found, run), (expected, _) = fit(2, path), fit(2)
    assert {g["lr"] for g in run.optimizers[0].param_groups} == {1e-3, RATIO * 1e-3}
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), True])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(AdapterError, match="lr_ratio must be"):
        LoRA(lr_ratio=ratio)

"""The step of the default AdamW: fused where that is right, and the same numbers everywhere."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import seed_everything
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision import FSDPPrecision
from tiny import Colours, module, save_base, trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import AdamW

from litflora.adapters import FLoRA, Full, LoRA, inject
from litflora.optim import LEARNING_RATES, OTHERS, default_optimizer, may_fuse

TUNINGS = [FLoRA(rank=2), LoRA(rank=2), Full()]

# Gradients that should be 0, such as those of the keys' biases, are rounding errors, and Adam makes
# them as large as any other: two implementations are compared in double precision.
DOUBLE = {"precision": "64-true"}


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path)


def plain(tuning, **settings):
    """The default of old, before steps were fused."""
    rate = LEARNING_RATES.get(type(tuning).__name__, OTHERS)
    return partial(AdamW, lr=rate, weight_decay=0.05, **settings)


def fit(base, folder, ckpt_path=None, epochs=2, options=(), **settings):
    seed_everything(3)
    run = trainer(folder, max_epochs=epochs, **dict(options))
    run.fit(made := module(base, **settings), Colours(), ckpt_path=ckpt_path, weights_only=True)
    return made, run


def checkpoint(base, folder, **settings):
    """What a run has left behind after its first epoch."""
    _, run = fit(base, folder, epochs=1, **settings)
    run.save_checkpoint(folder / "one.ckpt")
    return folder / "one.ckpt"


def kinds(run):
    """How the steps of a run are computed."""
    (optimizer,) = run.optimizers
    return {(group["fused"], group["foreach"]) for group in optimizer.param_groups}


def differ(one, other):
    expected = other.state_dict()
    return max((v - expected[key]).abs().max().item() for key, v in one.state_dict().items())


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((40, 30), (7,), (2, 1, 5))]


def steps(parameters, make, saved=None):
    """Takes steps that the parameters alone decide; returns the optimizer."""
    optimizer = make([{"params": parameters}])
    if saved is not None:
        optimizer.load_state_dict(deepcopy(saved))  # or steps would be counted in it
    for _ in range(3):
        for parameter in parameters:
            parameter.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# What is chosen -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "clip", "fused"),
    [
        ("32-true", None, True),
        ("32-true", 0.5, True),
        ("bf16-mixed", None, True),
        ("bf16-mixed", 0.0, True),
        ("bf16-mixed", 0.5, None),  # Lightning refuses to clip here
    ],
)
def test_steps_are_fused_unless_gradients_are_clipped_in_mixed_precision(
    base, tmp_path, precision, clip, fused
):
    options = {"precision": precision, "gradient_clip_val": clip}
    _, run = fit(base, tmp_path, epochs=1, options=options, tuning=LoRA(rank=2))
    assert kinds(run) == {(fused, None)}


def test_nothing_is_fused_under_fsdp_or_a_scaler_or_without_a_trainer(base, tmp_path):
    run = trainer(tmp_path)
    assert may_fuse(run)
    run.strategy.precision_plugin = FSDPPrecision("bf16-mixed")
    assert not may_fuse(run)
    run.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    assert not may_fuse(run)
    made = module(base, lr_scheduler=None)
    made.configure_model()
    assert made.configure_optimizers().defaults["fused"] is None


@pytest.mark.parametrize("given", [{"fused": False}, {"foreach": True}, {}], ids=str)
def test_an_optimizer_that_is_named_is_left_alone(base, tmp_path, given):
    settings = {"tuning": LoRA(rank=2), "optimizer": partial(AdamW, **given)}
    expected = {(given.get("fused"), given.get("foreach"))}
    _, run = fit(base, tmp_path, epochs=1, **settings)
    assert kinds(run) == expected
    run.save_checkpoint(path := tmp_path / "own.ckpt")
    assert kinds(fit(base, tmp_path, path, **settings)[1]) == expected


ODD = {
    "no kernel": torch.ones(2, device="meta"),
    "complex": torch.ones(2, dtype=torch.complex64),
    "turned": torch.ones(4, 3).t(),
    "channels_last": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_one_parameter_that_no_kernel_takes_leaves_the_step_to_torch(odd):
    groups = [{"params": parameters()}, {"params": [nn.Parameter(odd)]}]
    make = default_optimizer("LoRA")
    assert make(groups[:1]).defaults["fused"] is True
    assert make(groups).defaults["fused"] is None


# The same numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda t: type(t).__name__)
def test_fused_steps_train_as_a_loop_does(base, tmp_path, tuning):
    found, run = fit(base, tmp_path, options=DOUBLE, tuning=tuning)
    loop = plain(tuning, foreach=False)
    expected, other = fit(base, tmp_path, options=DOUBLE, tuning=tuning, optimizer=loop)
    assert (kinds(run), kinds(other)) == ({(True, None)}, {(None, False)})
    assert differ(found, expected) < 1e-9


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_one_step_after_another_is_a_loops(dtype, near):
    found, expected = parameters(dtype), parameters(dtype)
    steps(found, default_optimizer("LoRA"))
    steps(expected, plain(LoRA(), foreach=False))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=near, atol=near)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(("share", "fused"), [(3, True), (2, None)], ids=["all", "some"])
def test_sharded_parameters_take_the_same_steps(mesh, share, fused):
    """torch computes no fused step of DTensors and others at once."""
    whole = parameters()
    sharded = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in parameters()]
    optimizer = steps(sharded[:share] + parameters()[share:], default_optimizer("LoRA"))
    assert optimizer.defaults["fused"] is fused
    steps(whole, plain(LoRA(), foreach=False))
    for one, other in zip(sharded[:share], whole, strict=False):
        assert torch.allclose(one.full_tensor(), other, atol=1e-6)


# Checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda t: type(t).__name__)
def test_a_checkpoint_of_before_steps_were_fused_goes_on(base, tmp_path, tuning):
    old = {"tuning": tuning, "optimizer": plain(tuning), "options": DOUBLE}
    path = checkpoint(base, tmp_path, **old)
    expected, _ = fit(base, tmp_path, path, **old)
    found, run = fit(base, tmp_path, path, options=DOUBLE, tuning=tuning)
    assert kinds(run) == {(True, None)}
    assert run.global_step == 6
    assert differ(found, expected) < 1e-9


def test_a_checkpoint_of_before_steps_were_fused_goes_on_in_half_precision(base, tmp_path):
    """Under a scaler no step is fused, before or after."""
    old = {"tuning": LoRA(rank=2), "optimizer": plain(LoRA())}
    path = checkpoint(base, tmp_path, options=half(), **old)
    expected, _ = fit(base, tmp_path, path, options=half(), **old)
    found, run = fit(base, tmp_path, path, options=half(), tuning=LoRA(rank=2))
    assert kinds(run) == {(None, None)}
    assert differ(found, expected) < 1e-6


def half():
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def test_a_checkpoint_of_fused_steps_goes_on_where_they_may_not_be(base, tmp_path):
    path = checkpoint(base, tmp_path, tuning=LoRA(rank=2))
    clipped = {"precision": "bf16-mixed", "gradient_clip_val": 0.5}
    _, run = fit(base, tmp_path, path, options=clipped, tuning=LoRA(rank=2))
    assert kinds(run) == {(None, None)}
    assert run.global_step == 6


def test_moments_that_were_laid_out_otherwise_are_read_aright():
    turned = [nn.Parameter(p.detach().t().contiguous().t()) for p in parameters()[:1]]
    saved = steps(turned, plain(LoRA())).state_dict()
    assert not saved["state"][0]["exp_avg"].is_contiguous()
    found, expected = ([nn.Parameter(turned[0].detach().contiguous())] for _ in range(2))
    optimizer = steps(found, default_optimizer("LoRA"), saved)
    steps(expected, plain(LoRA(), foreach=False), saved)
    assert optimizer.defaults["fused"] is True
    assert torch.allclose(found[0], expected[0], atol=1e-6)


@pytest.mark.parametrize("path", ["side", "rebuilt", "merged"])
def test_a_step_between_forward_and_backward_is_noticed(path):
    """A fused kernel moves no version counter by itself."""
    net = nn.Sequential(nn.Linear(16, 16))
    inject(net, LoRA(rank=2, targets="linear", path=path))
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = default_optimizer("LoRA")([{"params": trained}])
    assert optimizer.defaults["fused"]
    x = torch.randn(8, 16, requires_grad=True)
    net(x).sum().backward()
    y = net(x).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_plain_numbers_in_an_old_state_are_taken():
    parameter = nn.Parameter(torch.ones(3))
    old = AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    old.step()
    state = deepcopy(old.state_dict())
    new = default_optimizer("LoRA")([{"params": [parameter]}])
    new.load_state_dict(state)
    state["state"][0]["step"] = 1
    again = default_optimizer("LoRA")([{"params": [parameter]}])
    again.load_state_dict(state)
    assert float(again.state[parameter]["step"]) == float(new.state[parameter]["step"]) == 1


def test_the_state_of_another_optimizer_is_refused():
    parameter = nn.Parameter(torch.ones(3))
    state = torch.optim.SGD([parameter], lr=0.1).state_dict()
    with pytest.raises(ValueError, match="another optimizer than AdamW: name it"):
        default_optimizer("LoRA")([{"params": [parameter]}]).load_state_dict(state)


@pytest.mark.parametrize("changed", ["parameter", "gradient"])
def test_what_is_laid_out_anew_after_the_optimizer_was_made_is_stepped_aright(changed):
    nets = [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    fused = default_optimizer("LoRA")([{"params": list(nets[0].parameters())}])
    loop = AdamW(nets[1].parameters(), lr=LEARNING_RATES.get("LoRA", OTHERS), weight_decay=0.05)
    assert fused.defaults["fused"]
    for turn in range(4):
        if turn == 1 and changed == "parameter":
            nets[0].to(memory_format=torch.channels_last)
        x = torch.randn(2, 4, 5, 5)
        for net, optimizer in zip(nets, (fused, loop), strict=True):
            net.zero_grad()
            net(x).square().sum().backward()
            if turn >= 1 and changed == "gradient":
                weight = net.weight
                weight.grad = weight.grad.contiguous(memory_format=torch.channels_last)
            optimizer.step()
    torch.testing.assert_close(nets[0].weight, nets[1].weight, rtol=1e-5, atol=1e-6)

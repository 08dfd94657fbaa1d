"""EMA: its numbers, and that all that is left of a run has them."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from shell import QUIET, litflora
from tiny import Colours, module, save_base, trainer

from litflora.adapters import FLoRA, Full, read_config
from litflora.callbacks import EMA, AdapterFolder
from litflora.module import from_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*WeightAveraging doesn't support sharding")

DECAY = 0.6


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path)


class Watch(Callback):
    """Keeps the weights after each step, and those that are evaluated."""

    def __init__(self):
        self.steps, self.evaluated = [], None

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(trained(pl_module))

    def on_validation_epoch_end(self, trainer, pl_module):
        self.evaluated = trained(pl_module)


def trained(made):
    return {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}


def fit(base, folder, *callbacks, ckpt_path=None, tuning=None, decay=DECAY, **options):
    torch.manual_seed(0)
    made = module(base, tuning=tuning or FLoRA(rank=2), lr_scheduler=None)
    watch, settings = Watch(), {"max_epochs": 2, "num_sanity_val_steps": 0, **options}
    own = [EMA(decay), watch, AdapterFolder(), *callbacks]
    run = trainer(folder, callbacks=own, **settings)
    run.fit(made, Colours(root=str(folder)), ckpt_path=ckpt_path, weights_only=True)
    return made, watch, run


class Uncopied:
    """As a trainer of several processes is, to which the command line's factories lead."""

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")

    def __call__(self, optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def test_the_copy_is_one_of_weights_alone(base, tmp_path):
    made = module(base)
    made.scheduler_factory = Uncopied()
    trainer(tmp_path, callbacks=[EMA(DECAY)]).fit(made, Colours(root=str(tmp_path)))
    assert isinstance(made.scheduler_factory, Uncopied)


def average(steps):
    found = steps[0]
    for step in steps[1:]:
        found = {name: DECAY * value + (1 - DECAY) * step[name] for name, value in found.items()}
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("tuning", [FLoRA(rank=2), Full()], ids=["FLoRA", "Full"])
def test_what_is_evaluated_and_left_is_the_average(base, tmp_path, tuning):
    made, watch, _ = fit(base, tmp_path, tuning=tuning)
    expected = average(watch.steps)
    assert max((value - watch.steps[-1][n]).abs().max() for n, value in expected.items()) > 1e-4
    for name, value in trained(made).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    assert_same(watch.evaluated, trained(made))


def test_the_frozen_base_is_neither_moved_nor_copied(base, tmp_path):
    start = module(base)
    start.configure_model()
    made, _, run = fit(base, tmp_path)
    (ema,) = (callback for callback in run.callbacks if isinstance(callback, EMA))
    averages = dict(ema._average_model.module.named_parameters())
    for name, parameter in made.named_parameters():
        shared = averages[name].data_ptr() == parameter.data_ptr()
        assert shared is not parameter.requires_grad, name
        if not parameter.requires_grad:
            assert torch.equal(parameter, start.get_parameter(name)), name


def test_accumulated_batches_are_one_step(base, tmp_path):
    made, watch, _ = fit(base, tmp_path, accumulate_grad_batches=3, max_epochs=3)
    expected = average(watch.steps[2::3])
    for name, value in trained(made).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_the_average_has_the_type_of_the_weights(base, tmp_path, precision):
    made, watch, _ = fit(base, tmp_path, precision=precision)
    expected = average(watch.steps)
    for name, value in trained(made).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)


def test_the_adapter_folder_holds_the_average(base, tmp_path):
    made, _, _ = fit(base, tmp_path)
    again = from_adapter(tmp_path / "adapter")
    again.configure_model()  # which checks that the base is bit for bit what it was
    assert_same(trained(again), trained(made))


def test_the_best_average_is_kept(base, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=1, save_weights_only=False)
    fit(base, tmp_path, best, enable_checkpointing=True)
    state = torch.load(best.best_model_path, weights_only=True)
    again = from_adapter(tmp_path / "adapter")
    again.configure_model()
    found = trained(again)
    assert_same(found, {name: state["state_dict"][name] for name in found})
    current = state["current_model_state"]
    assert current.keys() == state["state_dict"].keys()  # neither has the frozen base
    assert any(not torch.equal(current[name], value) for name, value in found.items())


@pytest.mark.parametrize("tuning", [FLoRA(rank=2), Full()], ids=["FLoRA", "Full"])
def test_a_resumed_run_goes_on_bit_for_bit(base, tmp_path, tuning):
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    options = {"tuning": tuning, "enable_checkpointing": True}
    whole, watch, _ = fit(base, tmp_path, every, max_epochs=3, **options)
    half = ModelCheckpoint(tmp_path / "again", filename="{epoch}", save_top_k=-1)
    ckpt_path = tmp_path / "epoch=1.ckpt"
    resumed, after, _ = fit(base, tmp_path, half, max_epochs=3, ckpt_path=ckpt_path, **options)
    assert len(after.steps) == len(watch.steps) // 3
    for found, expected in zip(after.steps, watch.steps[-len(after.steps) :], strict=True):
        assert_same(found, expected)
    assert_same(trained(resumed), trained(whole))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_has_bounds(decay):
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\)"):
        EMA(decay)


def test_the_recipe_of_the_command_line(tmp_path):
    small = {
        "data.init_args.train_samples": 4,
        "data.init_args.val_samples": 2,
        "data.init_args.img_size": 32,
        "data.init_args.batch_size": 2,
        "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": tmp_path,
    }
    options = [str(each) for key, value in small.items() for each in (f"--{key}", value)]
    recipes = ("--config", "segmentation/shapes", "--config", "trainer/ema")
    ran = litflora("fit", *recipes, *options, *QUIET)
    assert ran.code == 0, ran.err
    assert "sharding" not in ran.err
    (adapter,) = Path(tmp_path).glob("**/adapter")
    assert read_config(adapter)["method"] == ["FLoRA"]
    (checkpoint,) = Path(tmp_path).glob("**/last.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    again = from_adapter(adapter)
    again.configure_model()
    found = trained(again)
    assert found
    assert_same(found, {name: state["state_dict"][name] for name in found})

"""RankBudget: the budget is met, by whatever road the steps come, and the folder is smaller."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny import Colours, module, save_base, trainer

from litflora.adapters import AdaLoRA, FLoRA, LoRA, RankAllocator, orthogonality, read_config
from litflora.callbacks import EMA, AdapterFolder, NonFinite, RankBudget
from litflora.classification import ClassificationModule
from litflora.module import from_adapter

TUNINGS = {"AdaLoRA": AdaLoRA(rank=4), "FLoRA": FLoRA(rank=4)}
SHORT = {"target": 0.4, "warmup": 0.2, "final": 0.3, "interval": 2}  # of 12 steps: from 2 to 9


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path)


@pytest.fixture(scope="module", params=TUNINGS)
def whole(request, tmp_path_factory):
    """A run of twelve steps, which no test changes: its tuning, folder, and what `fit` gives."""
    folder = tmp_path_factory.mktemp(request.param)
    every = ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
    options = {"tuning": request.param, "enable_checkpointing": True}
    return request.param, folder, fit(save_base(folder), folder, every, AdapterFolder(), **options)


class Watch(Callback):
    """Keeps what trains after each batch, the gradients of it before each step, and the log."""

    def __init__(self):
        self.after, self.gradients, self.slices = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append({name: grad.clone() for name, grad in grads.items()})

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.after.append(trained(pl_module))
        self.slices.append(int(trainer.callback_metrics.get("train/rank_slices", 0)))


def trained(made):
    return {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}


def fit(base, folder, *callbacks, tuning="FLoRA", budget=None, ckpt_path=None, **options):
    torch.manual_seed(0)
    made = module(
        base, tuning=TUNINGS[tuning] if isinstance(tuning, str) else tuning, lr_scheduler=None
    )
    watch, budget = Watch(), budget or RankBudget(**SHORT)
    settings = {"max_epochs": 4, "num_sanity_val_steps": 0, "limit_val_batches": 0, **options}
    run = trainer(folder, callbacks=[budget, watch, *callbacks], **settings)
    run.fit(made, Colours(root=str(folder)), ckpt_path=ckpt_path, weights_only=True)
    return made, budget, watch


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def counted(config):
    """The slices that a folder's record counts."""
    total = 0
    for record in config["deltas"].values():
        ranks = record.get("ranks", [record.get("rank")])
        total += sum(r for r, n in zip(ranks, record["shape"], strict=False) if n > 1)
    return total


def test_the_folder_meets_the_budget_exactly(whole):
    _, folder, (made, budget, watch) = whole
    size = budget.allocator.size
    last = round(0.4 * size)
    assert watch.slices[:3] == [size] * 3
    assert watch.slices == sorted(watch.slices, reverse=True)
    assert len(set(watch.slices)) == 4  # after steps 4, 6, 8, and 9, which is the last one
    assert watch.slices[8:] == [last] * 4
    config = read_config(folder / "adapter")
    assert counted(config) == last
    ranks = {str(record.get("ranks", record.get("rank"))) for record in config["deltas"].values()}
    assert len(ranks) > 1, "every layer got the same"
    again = from_adapter(folder / "adapter")
    again.configure_model()
    fewer, all_of_them = (sum(map(torch.numel, trained(m).values())) for m in (again, made))
    assert fewer < all_of_them
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found, expected = (each.eval()(images) for each in (again, made))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", [6, 9])  # while the budget falls, and after it
def test_a_resumed_run_goes_on_bit_for_bit(whole, tmp_path, step):
    tuning, folder, (made, budget, watch) = whole
    path, base = folder / f"step={step}.ckpt", folder / "test_vit.safetensors"
    resumed, again, after = fit(base, tmp_path, tuning=tuning, ckpt_path=path)
    assert len(after.after) == 12 - step
    for found, expected in zip(after.after, watch.after[step:], strict=True):
        assert_same(found, expected)
    assert_same(trained(resumed), trained(made))
    assert torch.equal(torch.cat(again.allocator.kept), torch.cat(budget.allocator.kept))


def test_accumulated_batches_are_one_step(base, tmp_path, monkeypatch):
    steps, allocations = [], []
    update, allocate = RankAllocator.update, RankAllocator.allocate
    monkeypatch.setattr(
        RankAllocator, "update", lambda self, scale: (steps.append(scale), update(self, scale))
    )
    monkeypatch.setattr(
        RankAllocator,
        "allocate",
        lambda self, budget: (allocations.append(budget), allocate(self, budget)),
    )
    _, budget, watch = fit(base, tmp_path, accumulate_grad_batches=3, max_epochs=5)
    assert steps == [1.0] * 3  # of five steps those before the last allocation
    assert len(allocations) == 2  # after steps 2 and 4
    assert allocations[-1] == round(0.4 * budget.allocator.size)
    assert len(watch.slices) == 15
    assert watch.slices[4] > watch.slices[5] == watch.slices[10] > watch.slices[11]


def test_in_the_last_part_masked_slices_neither_move_nor_pull(whole):
    tuning, _, (_, _, watch) = whole
    gate = "core" if tuning == "FLoRA" else "lora_E"
    names = [name for name in watch.after[-1] if name.endswith(gate)]
    masked = {name: watch.after[8][name] == 0 for name in names}
    assert sum(int(mask.sum()) for mask in masked.values()) > 10
    for after in watch.after[9:]:
        for name, mask in masked.items():
            assert torch.equal(after[name] == 0, mask), name
    # A callback that comes after the budget sees no gradients of them, and sees the others'.
    for gradients in watch.gradients[9:]:
        assert not any(gradients[name][mask].any() for name, mask in masked.items())
        assert all(gradients[name][~mask].all() for name, mask in masked.items())
    assert any(watch.gradients[8][name][mask].any() for name, mask in masked.items())


def test_orthogonality_is_as_if_the_loss_had_it(base, tmp_path, monkeypatch):
    options = {"tuning": "AdaLoRA", "accumulate_grad_batches": 3, "max_epochs": 3}
    made, _, watch = fit(base, tmp_path, budget=RankBudget(**SHORT, orthogonality=0.3), **options)
    _, _, without = fit(base, tmp_path, budget=RankBudget(**SHORT, orthogonality=0), **options)
    own = ClassificationModule.training_step
    monkeypatch.setattr(
        ClassificationModule,
        "training_step",
        lambda self, *batch: own(self, *batch) + 0.3 * orthogonality(self),
    )
    told, _, expected = fit(base, tmp_path, budget=RankBudget(**SHORT, orthogonality=0), **options)
    moved = 0.0
    for name, value in watch.gradients[0].items():
        torch.testing.assert_close(value, expected.gradients[0][name], atol=1e-6, rtol=1e-4)
        moved = max(moved, float((value - without.gradients[0][name]).abs().max()))
    assert moved > 1e-4
    for name, value in trained(made).items():
        torch.testing.assert_close(value, trained(told)[name], atol=1e-4, rtol=1e-3)


def test_a_scaler_changes_no_score(base, tmp_path):
    averages = []
    for fused, scale in ((False, 1.0), (False, 2.0**10), (True, 2.0**10)):
        torch.manual_seed(0)
        own = {"optimizer": partial(torch.optim.AdamW, lr=1e-3, fused=fused)}
        made = module(base, tuning=TUNINGS["AdaLoRA"], lr_scheduler=None, **own)
        budget = RankBudget(target=0.4, warmup=0.5, final=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        half = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
        run = trainer(tmp_path, callbacks=[budget], limit_val_batches=0, **half)
        run.fit(made, Colours(root=str(tmp_path)))
        averages.append(budget.allocator.state_dict()["sensitivity"])
    assert any(value.any() for value in averages[0].values())
    for name, value in averages[0].items():
        for other in averages[1:]:
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=0.02)


class Spoil(Callback):
    """Makes the gradients of the second step no numbers."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 1:
            next(p.grad for p in pl_module.parameters() if p.grad is not None).fill_(torch.nan)


@pytest.mark.filterwarnings("ignore:step .* was skipped")
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_skipped_is_not_scored(base, tmp_path, first):
    guard = NonFinite()
    torch.manual_seed(0)
    made, budget = module(base, tuning=TUNINGS["AdaLoRA"]), RankBudget(**SHORT)
    callbacks = [Spoil(), *([guard, budget] if first else [budget, guard])]
    run = trainer(tmp_path, callbacks=callbacks, max_epochs=2, limit_val_batches=0)
    run.fit(made, Colours(root=str(tmp_path)))
    assert guard.skipped == 1
    state = budget.allocator.state_dict()
    assert all(value.isfinite().all() for value in state["sensitivity"].values())
    assert sum(int(k.sum()) for k in budget.allocator.kept) == round(0.4 * budget.allocator.size)
    assert all(value.isfinite().all() for value in trained(made).values())


def test_what_is_left_is_said(base, tmp_path, capsys):
    _, budget, _ = fit(base, tmp_path)
    size, modes = budget.allocator.size, budget.allocator.modes
    last = round(0.4 * size)
    said = f"budget   {last} of {size} slices are left, a mean rank of {last / modes:.1f}"
    assert said in capsys.readouterr().out


def test_a_training_that_ends_early_says_that_the_budget_is_not_met(base, tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 5

    with pytest.warns(UserWarning, match="ended at step 5: the rank budget would .* at step 9"):
        fit(base, tmp_path, Stop())


def test_the_best_weights_may_be_of_before(base, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/loss")
    with pytest.warns(UserWarning, match="best weights by val/loss may be of before"):
        fit(base, tmp_path, best, enable_checkpointing=True, max_epochs=1, limit_val_batches=1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target": 0}, "target must be above 0"),
        ({"warmup": 0.5, "final": 0.5}, "leave some of it"),
        ({"warmup": -0.1}, "leave some of it"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"beta1": 1.0}, "beta1 must lie between 0 and 1"),
        ({"orthogonality": -1}, "orthogonality must be 0 or more"),
    ],
)
def test_settings_have_bounds(settings, told):
    with pytest.raises(ValueError, match=told):
        RankBudget(**settings)


@pytest.mark.parametrize(
    ("tuning", "budget", "told"),
    [
        (LoRA(rank=2), {}, "for AdaLoRA or FLoRA, and no delta"),
        (AdaLoRA(rank=4), {"target": 4}, "start with a higher rank"),
        (AdaLoRA(rank=4), {"target": 0.001}, "at least 1"),
        (FLoRA(rank=4), {"target": 0.1}, "is .* slices of"),
    ],
)
def test_a_budget_that_does_not_fit_is_refused(base, tmp_path, tuning, budget, told):
    with pytest.raises(ValueError, match=told):
        fit(base, tmp_path, tuning=tuning, budget=RankBudget(**budget))


def test_an_average_of_the_weights_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="leave EMA"):
        fit(base, tmp_path, EMA())


def test_a_run_without_end_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="needs the length of the run"):
        fit(base, tmp_path, max_epochs=-1)


def test_a_whole_target_is_the_mean_rank(base, tmp_path):
    own = RankBudget(target=2, final=0)
    _, budget, _ = fit(base, tmp_path, tuning="AdaLoRA", budget=own, max_epochs=1)
    kept = sum(int(kept.sum()) for kept in budget.allocator.kept)
    assert kept == 2 * budget.allocator.modes == 2 * len(budget.allocator.kept)

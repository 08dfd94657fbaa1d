"""NonFinite: steps of no numbers change nothing, and end the run if they do not end."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny import Colours, module, save_base, trainer

from litflora.adapters import FLoRA
from litflora.callbacks import NonFinite
from litflora.classification import ClassificationModule

pytestmark = pytest.mark.filterwarnings("ignore:step .* was skipped", "ignore:train/loss is")


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path)


class Spoil(Callback):
    """Makes the images of some batches, by number, what no loss is finite of."""

    def __init__(self, *batches):
        self.batches, self.states = batches, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx in self.batches:
            batch[0].fill_(float("nan"))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
        for number, moments in trainer.optimizers[0].state_dict()["state"].items():
            state |= {f"{number}.{name}": value.clone() for name, value in moments.items()}
        self.states.append(state)


def fit(base, folder, spoil, guard=None, **options):
    torch.manual_seed(0)
    made = module(base, tuning=FLoRA(rank=2))
    guard = guard or NonFinite()
    run = trainer(folder, callbacks=[spoil, guard], max_epochs=2, limit_val_batches=0, **options)
    run.fit(made, Colours(n=32))
    return run, guard


def moved(before, after):
    return any(not torch.equal(before[name], value) for name, value in after.items())


def test_a_step_of_nan_moves_neither_weights_nor_moments(base, tmp_path):
    spoil = Spoil(3)
    run, guard = fit(base, tmp_path, spoil)
    assert not moved(spoil.states[2], spoil.states[3])
    assert moved(spoil.states[3], spoil.states[4])
    assert all(value.isfinite().all() for value in spoil.states[-1].values())
    assert run.global_step == 8  # the schedule goes on
    assert run.callback_metrics["train/skipped_steps"] == 1
    assert guard.state_dict() == {"skipped": 1, "in_a_row": 0}
    again = NonFinite()
    again.load_state_dict(guard.state_dict())
    assert again.skipped == 1


def test_a_run_of_numbers_is_as_without_the_guard(base, tmp_path):
    plain, guarded = Spoil(), Spoil()
    torch.manual_seed(0)
    alone = trainer(tmp_path, callbacks=[plain], max_epochs=2, limit_val_batches=0)
    alone.fit(module(base, tuning=FLoRA(rank=2)), Colours(n=32))
    run, _ = fit(base, tmp_path, guarded)
    assert not moved(plain.states[-1], guarded.states[-1])
    assert "train/skipped_steps" not in run.callback_metrics


def infinite_loss(monkeypatch, rank=0):
    """Adds infinity to a process's second loss, whose gradients stay what they are."""
    plain, made = ClassificationModule.training_step, []

    def step(self, batch, batch_idx):
        made.append(plain(self, batch, batch_idx))
        wrong = len(made) == 2 and self.global_rank == rank
        return made[-1] + (float("inf") if wrong else 0.0)

    monkeypatch.setattr(ClassificationModule, "training_step", step)


def test_an_infinite_loss_with_finite_gradients_is_skipped(base, tmp_path, monkeypatch):
    infinite_loss(monkeypatch)
    spoil = Spoil()
    _, guard = fit(base, tmp_path, spoil)
    assert guard.skipped == 1
    assert not moved(spoil.states[0], spoil.states[1])


def test_it_stops_after_so_many_in_a_row_and_leaves_their_batches(base, tmp_path):
    spoil = Spoil(1, 3, 4, 5, 6, 7)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row") as stop:
        fit(base, tmp_path, spoil, NonFinite(limit=3))
    path = tmp_path / "nonfinite" / "step_5_rank_0.pt"
    assert str(path) in str(stop.value)
    ((images, labels),) = torch.load(path, weights_only=True)["batches"]
    assert images.isnan().all()
    assert labels.shape == (8,)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_batch_at_fault_is_kept_where_gradients_are_accumulated(base, tmp_path):
    with pytest.raises(FloatingPointError):
        fit(base, tmp_path, Spoil(2), NonFinite(limit=1), accumulate_grad_batches=2)
    kept = torch.load(tmp_path / "nonfinite" / "step_1_rank_0.pt", weights_only=True)["batches"]
    assert [images.isnan().any().item() for images, _ in kept] == [True]  # not the one after it


def test_of_gradients_alone_at_fault_the_last_batch_is_kept(base, tmp_path):
    class Burst(Callback):
        def on_after_backward(self, trainer, pl_module):
            next(p.grad for p in pl_module.parameters() if p.grad is not None).fill_(torch.inf)

    with pytest.raises(FloatingPointError):
        fit(base, tmp_path, Burst(), NonFinite(limit=1), accumulate_grad_batches=2)
    kept = torch.load(tmp_path / "nonfinite" / "step_0_rank_0.pt", weights_only=True)["batches"]
    assert [len(labels) for _, labels in kept] == [8]


@pytest.mark.parametrize("fused", [True, False])
def test_a_scaler_takes_no_step_of_an_infinite_loss(base, tmp_path, monkeypatch, fused):
    infinite_loss(monkeypatch)
    half = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    spoil = Spoil()
    tuned = {
        "tuning": FLoRA(rank=2),
        "optimizer": lambda p: torch.optim.AdamW(p, 1e-3, fused=fused),
    }
    guard = NonFinite()
    run = trainer(tmp_path, callbacks=[spoil, guard], limit_val_batches=0, **half)
    run.fit(module(base, **tuned), Colours(n=32))
    assert guard.skipped == 1
    assert not moved(spoil.states[0], spoil.states[1])
    assert moved(spoil.states[1], spoil.states[2])


def test_a_scaler_finds_its_scale_by_itself(base, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # overflows in the first steps
    half = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    _, guard = fit(base, tmp_path, Spoil(), NonFinite(limit=1), **half)
    assert scaler.get_scale() < 2.0**60
    assert guard.skipped == 0


def test_limit_has_a_bound():
    with pytest.raises(ValueError, match="limit must be at least 1"):
        NonFinite(limit=0)

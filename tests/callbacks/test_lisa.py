"""LISA: what moves, what is kept, and that a run can end and go on anywhere.

The numbers in names of tests are those of issues that other implementations had: LMFlow's, if
nothing else is said.
"""

import csv
import pickle
import random
import re

import pytest
import torch
import worlds
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny import NAMES, SIZE, module, save_base
from torch import nn

from litflora import from_adapter
from litflora.adapters import Full
from litflora.callbacks import EMA, LISA, AdapterFolder
from litflora.callbacks._units import find_units
from litflora.classification import ClassificationModule

from .lisa_runs import BLOCKS, assert_same, fit, units_of, weights, work

pytestmark = pytest.mark.filterwarnings(
    "ignore:interval . leaves", "ignore:.*WeightAveraging doesn't support sharding"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def sampled(base, tmp_path_factory):
    """Eight periods of two blocks and two steps each."""
    return fit(base, tmp_path_factory.mktemp("sampled"), LISA(2, 2, seed=0), max_epochs=2)


# What moves ---------------------------------------------------------------------------------------


def test_806_a_block_moves_when_it_is_drawn_and_else_not(sampled):
    _, watch, _ = sampled
    outside = {name for name in watch.weights[0] if not units_of([name])}
    assert len(watch.moved) == 16
    for moved, graded, names in zip(watch.moved, watch.graded, watch.batches, strict=True):
        assert units_of(moved) == units_of(graded) == names
        assert len(names) == 2
        assert outside <= moved
        # The weights that a loss cannot see, as a key's bias, have gradients of rounding errors.
        assert moved <= graded
    assert {name for names in watch.batches for name in names} == set(BLOCKS)


def test_726_the_number_of_blocks_matters(sampled, base, tmp_path):
    first, second = (
        sampled[1].weights[1],
        fit(base, tmp_path, LISA(3, 2), max_steps=1)[1].weights[1],
    )
    assert any(not torch.equal(value, second[name]) for name, value in first.items())


def test_all_blocks_are_full_tuning_bit_for_bit(base, tmp_path):
    _, plain, _ = fit(base, tmp_path, None)
    before = random.getstate()
    _, all_of_them, _ = fit(base, tmp_path, LISA(6, 2, seed=0))
    assert random.getstate() == before
    for found, expected in zip(all_of_them.weights, plain.weights, strict=True):
        assert_same(found, expected)


def test_blocks_are_drawn_once_a_period_of_steps_axolotls_twice_at_the_start(base, tmp_path):
    lisa, drawn = LISA(2, 2, seed=0), []
    right = lisa._draw
    lisa._draw = lambda run: (right(run), drawn.append(run.global_step))
    _, watch, _ = fit(base, tmp_path, lisa, accumulate_grad_batches=2, max_epochs=2)
    assert drawn == [0, 2, 4, 6]
    assert watch.batches[::4] == watch.batches[1::4] == watch.batches[3::4]
    assert len({tuple(names) for names in watch.batches}) > 1


def test_893_any_optimizer_by_parameter(base, tmp_path):
    def sgd(groups):
        return torch.optim.SGD(groups, lr=1e-2, momentum=0.9)

    _, watch, _ = fit(base, tmp_path, LISA(2, 2, seed=0), optimizer=sgd)
    for moved, kept, names in zip(watch.moved, watch.kept, watch.batches, strict=True):
        assert units_of(moved) == units_of(kept) == names


def settings(base):
    own = {"backbone": "test_vit", "num_classes": 3, "weights": str(base), "img_size": SIZE}
    return {**own, "class_names": NAMES, "tuning": Full(), "lr": 1e-3, "lr_scheduler": None}


class Zeroing(ClassificationModule):
    """Keeps gradients as zeros, by which an optimizer goes on stepping."""

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


def test_a_gradient_of_before_moves_no_block_that_is_frozen(base, tmp_path):
    lisa = LISA(2, 2, seed=0, reset_state=False)
    _, watch, _ = fit(base, tmp_path, lisa, made=Zeroing(**settings(base)))
    for moved, names in zip(watch.moved, watch.batches, strict=True):
        assert units_of(moved) == names


def test_checkpointed_blocks_have_the_same_gradients(sampled, base, tmp_path):
    made = ClassificationModule(activation_checkpointing="blocks", **settings(base))
    _, watch, _ = fit(base, tmp_path, LISA(2, 2, seed=0), made=made)
    assert_same(watch.weights[8], sampled[1].weights[8])


# Memory -------------------------------------------------------------------------------------------


def test_778_state_does_not_grow_beyond_the_largest_blocks(sampled):
    made, watch, _ = sampled
    units = find_units(made.net)
    largest = max(unit.size for unit in units)
    outside = sum(p.nbytes for name, p in made.named_parameters() if not units_of([name]))
    tensors = sum(1 for p in made.parameters())  # AdamW counts the steps of each
    assert max(watch.bytes) <= 2 * (outside + 2 * largest) + 4 * tensors
    for kept, names in zip(watch.kept, watch.batches, strict=True):
        assert units_of(kept) == names
    assert sum(p.requires_grad for p in made.parameters()) == tensors  # in the end all train


def test_state_may_stay(base, tmp_path):
    _, watch, _ = fit(base, tmp_path, LISA(2, 1, seed=0, reset_state=False))
    assert units_of(watch.kept[-1]) == BLOCKS


def test_a_block_that_is_drawn_again_begins_anew_and_one_that_stays_goes_on(base, tmp_path):
    counts = []

    class Counts(Callback):
        def on_train_batch_end(self, run, made, *_):
            state = {n: run.optimizers[0].state.get(p) for n, p in made.net.named_parameters()}
            counts.append({b: state[f"{b}.mlp.fc1.weight"] for b in BLOCKS})
            counts[-1] = {b: s and int(s["step"]) for b, s in counts[-1].items()}

    _, watch, _ = fit(base, tmp_path, LISA(3, 2, seed=0), Counts(), max_epochs=2)
    expected, continued = dict.fromkeys(BLOCKS), 0
    for found, names in zip(counts, watch.batches, strict=True):
        continued += sum(expected[b] == 2 for b in names)
        expected = {b: (expected[b] or 0) + 1 if b in names else None for b in BLOCKS}
        assert found == expected
    assert continued


def test_a_period_is_told(base, tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="", version="")
    lisa = LISA(2, 4, seed=0)
    made, watch, _ = fit(base, tmp_path, lisa, logger=logger, max_epochs=1)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["lisa/active_0"]]
    first, second = ({name: float(value or 0) for name, value in row.items()} for row in rows)
    assert (first["step"], second["step"]) == (0, 4)
    for told, batch in ((first, 0), (second, 4)):
        numbers = [told["lisa/active_0"], told["lisa/active_1"]]
        assert [BLOCKS[int(number)] for number in numbers] == watch.batches[batch]
        trained = [p for name, p in made.named_parameters() if name in watch.graded[batch]]
        assert told["lisa/trainable_parameters"] == sum(p.numel() for p in trained)
        assert told["lisa/optimizer_bytes"] == watch.bytes[batch]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lisa")]
    size = first["lisa/trainable_parameters"] * 12 / 1e6  # a gradient and two moments
    whole = sum(p.numel() for p in made.parameters()) * 12 / 1e6
    words = r"lisa     2 of 6 blocks train .* take (.*) MB on average, (.*) MB at most, (.*) MB in"
    found = [float(number) for number in re.match(words, line).groups()]
    assert found == pytest.approx([size, size, whole], rel=0.03)


def test_rates_rise_in_a_period_and_the_schedule_does_not_see_it(base, tmp_path):
    used, left = [], []

    class Rates(Callback):
        def on_before_optimizer_step(self, run, made, optimizer):
            used.append(optimizer.param_groups[0]["lr"])

        def on_train_batch_end(self, run, made, *_):
            left.append(run.optimizers[0].param_groups[0]["lr"])

    fit(base, tmp_path, LISA(2, 4, seed=0, warmup=2), Rates())
    assert used == pytest.approx([1e-3 * share for share in (1 / 3, 2 / 3, 1, 1)] * 2)
    assert left == [1e-3] * 8


def test_batch_norms_of_frozen_blocks_keep_their_statistics(tmp_path):
    base = save_base(tmp_path, "test_resnet")
    options = {"backbone": "test_resnet", "tuning": Full(), "lr_scheduler": None}
    made, lisa = module(base, **options), LISA(1, 8, seed=0)

    class Statistics(Callback):
        def on_train_start(self, run, made):
            self.before = {n: b.clone() for n, b in made.net.named_buffers()}

    start = Statistics()
    fit(base, tmp_path, lisa, start, made=made)
    moved = {n for n, b in made.net.named_buffers() if not torch.equal(b, start.before[n])}
    blocks = {unit.name for unit in find_units(made.net)}
    inside = {block for block in blocks for name in moved if name.startswith(f"{block}.")}
    assert inside == set(lisa.names)
    assert any(not name.startswith(tuple(f"{b}." for b in blocks)) for name in moved)
    assert all(m.training for m in made.net.modules() if isinstance(m, nn.BatchNorm2d))


# Ending and going on ------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_bit_for_bit(base, tmp_path):
    """From the end of an epoch of eight steps: a period goes on, and others follow."""
    options = {"max_epochs": 2, "enable_checkpointing": True}
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    _, whole, run = fit(base, tmp_path, LISA(2, 3, warmup=1), keep, **options)
    lisa = LISA(2, 3, warmup=1)
    again = ModelCheckpoint(tmp_path / "again")
    random.seed(1)
    _, after, resumed = fit(
        base, tmp_path, lisa, again, ckpt_path=tmp_path / "epoch=0.ckpt", **options
    )
    assert after.batches == whole.batches[8:]
    assert after.batches[0] == whole.batches[7]
    assert len({tuple(names) for names in after.batches}) > 1
    for found, expected in zip(after.weights, whole.weights[8:], strict=True):
        assert_same(found, expected)
    states = [each.optimizers[0].state_dict()["state"] for each in (resumed, run)]
    assert states[0].keys() == states[1].keys()
    for index, kept in states[0].items():
        assert_same(kept, states[1][index])


def test_checkpoints_and_the_adapters_folder_hold_blocks_that_are_frozen_now(base, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=3)
    options = {"enable_checkpointing": True, "max_steps": 7}
    made, watch, _ = fit(base, tmp_path, LISA(2, 2, seed=0), keep, AdapterFolder(), **options)
    state = torch.load(keep.best_model_path, weights_only=True)["state_dict"]
    assert_same(state, {key: watch.weights[6].get(key, value) for key, value in state.items()})
    assert watch.weights[0].keys() <= state.keys()
    again = from_adapter(tmp_path / "adapter")
    again.configure_model()
    assert_same(weights(again), weights(made))


def test_a_failed_step_leaves_no_block_frozen(base, tmp_path):
    class Fail(Callback):
        def on_before_backward(self, *_):
            raise RuntimeError("no more")

    made = module(base, tuning=Full())
    with pytest.raises(RuntimeError, match="no more"):
        fit(base, tmp_path, LISA(2, 2), Fail(), made=made)
    assert all(p.requires_grad for p in made.parameters())


class Ending(ClassificationModule):
    """Ends an epoch before its third step, as Lightning lets a module."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        return -1 if batch_idx == 2 else None


def test_an_epoch_that_a_hook_ends_leaves_no_block_frozen(base, tmp_path):
    made, watch, _ = fit(base, tmp_path, LISA(2, 2), made=Ending(**settings(base)))
    assert len(watch.batches) == 2
    assert all(p.requires_grad for p in made.parameters())


def test_the_average_is_one_of_all_blocks(base, tmp_path):
    made, watch, _ = fit(base, tmp_path, LISA(2, 2, seed=0), EMA(0.5), max_epochs=2)
    average = watch.weights[1]
    for step in watch.weights[2:]:
        average = {name: 0.5 * value + 0.5 * step[name] for name, value in average.items()}
    for name, value in weights(made).items():
        torch.testing.assert_close(value, average[name], atol=1e-6, rtol=1e-5)


def test_a_second_fit_draws_as_the_first_and_another_seed_otherwise(sampled, base, tmp_path):
    lisa, expected = LISA(2, 2, seed=0), sampled[1].batches[:8]
    assert [fit(base, tmp_path, lisa)[1].batches for _ in range(2)] == [expected] * 2
    assert fit(base, tmp_path, LISA(2, 2, seed=4))[1].batches != expected


def test_899_it_holds_no_network(base, tmp_path):
    lisa = LISA(2, 2)
    assert pickle.loads(pickle.dumps(lisa)).state_dict() == lisa.state_dict()
    fit(base, tmp_path, lisa, max_steps=1)
    own = {name: value for name, value in vars(lisa).items() if not name.startswith("log")}
    assert len(pickle.dumps(own)) < 10_000  # but for what Lightning gives a callback to log with


# Two processes ------------------------------------------------------------------------------------


def test_1474_two_processes_draw_and_train_alike(base, tmp_path):
    first, second = worlds.run(work, base, tmp_path)
    assert first["batches"] == second["batches"]
    assert len({tuple(names) for names in first["batches"]}) == 3
    assert first["losses"][0] != second["losses"][0]  # each has images of its own
    for found, expected in zip(first["weights"], second["weights"], strict=True):
        assert_same(found, expected)
    told = (first[name] for name in ("batches", "moved", "kept", "graded"))
    for names, *each in zip(*told, strict=True):
        assert [units_of(found) for found in each] == [names] * 3

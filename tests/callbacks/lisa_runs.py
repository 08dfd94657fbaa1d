"""Short fits with LISA, by one process or two, and what is taken down of them."""

from itertools import pairwise

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from tiny import Colours, module, trainer

from litflora.adapters import Full
from litflora.callbacks import LISA
from litflora.callbacks._units import state_sizes

BLOCKS = [f"blocks.{number}" for number in range(6)]


class Watch(Callback):
    """Takes down, for each batch: the units that train, gradients, states, and weights after it."""

    def __init__(self, lisa):
        self.lisa, self.batches, self.weights = lisa, [], []
        self.graded, self.kept, self.bytes, self.losses = [], [], [], []

    def on_train_start(self, run, made):
        self.weights.append(weights(made))
        for optimizer in run.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.on_step(run, made))

    def on_step(self, run, made):
        self.graded.append({n for n, p in made.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, run, made, outputs, *_):
        self.losses.append(float(outputs["loss"]))
        self.batches.append(self.lisa and list(self.lisa.names))
        self.weights.append(weights(made))
        state = run.optimizers[0].state
        self.kept.append({n for n, p in made.named_parameters() if p in state})
        self.bytes.append(state_sizes(run.optimizers)[0])

    @property
    def moved(self):
        """Names of what each batch has changed."""
        return [
            {name for name, value in after.items() if not torch.equal(value, before[name])}
            for before, after in pairwise(self.weights)
        ]


def weights(made):
    return {name: p.detach().clone() for name, p in made.named_parameters()}


def units_of(names):
    """The blocks that parameters lie in, in order; "" is all that is no block."""
    owner = {next((b for b in BLOCKS if f".{b}." in name), "") for name in names}
    return sorted(owner - {""})


def fit(base, folder, lisa, *callbacks, ckpt_path=None, n=32, weights_only=True, **options):
    made_of = {key: options.pop(key) for key in ("tuning", "optimizer", "made") if key in options}
    torch.manual_seed(0)
    made = made_of.pop("made", None) or module(
        base, **{"tuning": Full(), "lr": 1e-3, "lr_scheduler": None, **made_of}
    )
    watch = Watch(lisa)
    own = [*([lisa] if lisa else []), watch, *callbacks]
    run = trainer(folder, callbacks=own, num_sanity_val_steps=0, limit_val_batches=0, **options)
    data = Colours(root=str(folder), n=n, batch_size=4)
    run.fit(made, data, ckpt_path=ckpt_path, weights_only=weights_only)
    return made, watch, run


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


class Shared(Colours):
    """Each process has batches of its own."""

    def train_dataloader(self):
        return self._loader(self._data(0))


def work(base, folder):
    """What a process draws and gets, of a run whose seed is the first process's."""
    lisa = LISA(2, 2)
    watch = Watch(lisa)
    torch.manual_seed(0)
    made = module(base, tuning=Full(), lr=1e-3, lr_scheduler=None)
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    options = {"devices": 2, "strategy": strategy, "limit_val_batches": 0}
    run = trainer(folder, callbacks=[Differ(), lisa, watch], max_epochs=1, **options)
    run.fit(made, Shared(root=str(folder), n=48, batch_size=4))
    names = ("batches", "weights", "moved", "kept", "graded", "losses")
    return {name: getattr(watch, name) for name in names}


class Differ(Callback):
    """Leaves each process with a generator of its own, whatever it was seeded with."""

    def on_fit_start(self, run, made):
        torch.manual_seed(run.global_rank)

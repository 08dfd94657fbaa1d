"""LISA: which blocks take turns, how they are drawn, and what is refused.

The numbers in names of tests are those of issues that other implementations had: LMFlow's, if
nothing else is said.
"""

import random
from collections import Counter
from functools import cache

import pytest
import timm
import torch
from checkpoints import save_checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
)
from tiny import NAMES, SIZE, module, save_base, trainer

from litflora import PretrainedVisionLanguageModule, VisionLanguageModule
from litflora.adapters import BitFit, Frozen, Full, LoRA, Probe
from litflora.callbacks import LISA, _units
from litflora.callbacks._units import choice_sizes, choose, find_units
from litflora.classification import ClassificationModule
from litflora.strategies import FSDP2

from .lisa_runs import BLOCKS, fit

pytestmark = pytest.mark.filterwarnings("ignore:interval . leaves")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


# Units and draws ----------------------------------------------------------------------------------


def network(backbone):
    return timm.create_model(backbone, device="meta")


@cache
def convnext():
    return find_units(timm.create_model("convnext_large", num_classes=10, device="meta"))


@pytest.mark.parametrize(
    ("backbone", "count"), [("test_vit", 6), ("test_convnext", 9), ("test_resnet", 4)]
)
def test_719_blocks_of_any_family_are_found(backbone, count):
    net = network(backbone)
    units = find_units(net)
    assert len(units) == count
    named = [name for unit in units for name in unit.parameters]
    assert len(named) == len(set(named))
    for unit in units:
        for name, parameter in unit.parameters.items():
            assert net.get_parameter(name) is parameter
    rest = dict(net.named_parameters()).keys() - set(named)
    assert not any(".blocks." in name or "downsample" in name for name in rest)
    assert rest


def test_a_downsampling_is_one_with_the_block_that_follows():
    units = convnext()
    assert [len([u for u in units if f"s.{s}." in u.name]) for s in range(4)] == [3, 3, 27, 3]
    (first,) = [unit for unit in units if unit.name == "stages.1.blocks.0"]
    assert list(first.modules) == ["stages.1.downsample", "stages.1.blocks.0"]
    assert [len(unit.modules) for unit in units].count(2) == 3


def test_719_blocks_of_a_composed_network_are_found():
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    options = {"weights": None, "language_options": small, "language_tuning": Full()}
    made = VisionLanguageModule("test_vit", img_size=32, **options)
    units = find_units(made.build())
    stages = Counter(unit.stage for unit in units)
    assert stages["tower.blocks"] == 6
    (language,) = stages.keys() - {"tower.blocks"}
    assert language.startswith("language_model.")


def test_adapters_may_lie_outside_of_the_blocks_that_are_named(tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    parts = {"tower_tuning": LoRA(rank=2), "language_tuning": Full()}
    options = {"weights": None, "language_options": small, "img_size": 32}
    made = VisionLanguageModule("test_vit", **parts, **options)
    made.configure_model()
    run = trainer(tmp_path)
    run.strategy.optimizers = [torch.optim.SGD(made.parameters())]
    with pytest.raises(ValueError, match=r"tower\.blocks\.0\.\S* is frozen"):
        LISA(2).on_fit_start(run, made)
    lisa = LISA(2, units=["language_model.*.layers.*"])
    lisa.on_fit_start(run, made)
    assert len(lisa._units) == 2


def test_719_blocks_of_a_checkpoint_are_found_where_they_train(tmp_path):
    folder = save_checkpoint("llava", tmp_path)
    parts = {"tower_tuning": Frozen(), "connector_tuning": Full(), "language_tuning": Full()}
    made = PretrainedVisionLanguageModule(str(folder), **parts)
    made.configure_model()
    assert len(find_units(made.net)) == 4
    lisa, run = LISA(2), trainer(tmp_path)
    run.strategy.optimizers = [torch.optim.SGD(made.parameters())]
    lisa.on_fit_start(run, made)
    assert [unit.name for unit in lisa._units] == [
        f"model.model.language_model.layers.{i}" for i in range(2)
    ]
    with pytest.raises(ValueError, match=r"vision_tower\S* is frozen: take litflora.adapters.Full"):
        LISA(2, units=["*.encoder.layers.*"]).on_fit_start(run, made)


def test_patterns_stand_for_blocks(base, tmp_path):
    lisa = LISA(1, 2, seed=0, units=["blocks.[01]", "mlp"])
    _, watch, _ = fit(base, tmp_path, lisa)
    found = find_units(network("test_vit"), lisa.units)
    assert [unit.name for unit in found] == [*BLOCKS[:2], *(f"{b}.mlp" for b in BLOCKS[2:])]
    for moved, names in zip(watch.moved, watch.batches, strict=True):
        # The attention of the others is outside of units and always trains.
        assert {f"net.{b}.attn.qkv.weight" for b in BLOCKS[2:]} <= moved
        assert len(names) == 1


def test_719_an_error_lists_candidates():
    with pytest.raises(ValueError, match=r"'bloks' matches no module. Nearest: blocks"):
        find_units(network("test_vit"), ["bloks"])
    net = network("test_vit")
    net.group_matcher = lambda coarse: {"stem": "^patch_embed"}
    with pytest.raises(ValueError, match=r"name LISA's units: blocks\.\*"):
        find_units(net)


def draws(units, active, sampling, count=4000):
    generator = random.Random(1)  # the forecast has other draws
    orders = (generator.sample(units, len(units)) for _ in range(count))
    return [choose(order, active, sampling) for order in orders]


def test_897_sampling_is_uniform_and_without_replacement():
    units = find_units(network("test_vit"))
    drawn = draws(units, 2, "uniform")
    assert all(len(set(each)) == 2 for each in drawn)
    counts = Counter(unit.name for each in drawn for unit in each)
    for name in BLOCKS:
        assert counts[name] == pytest.approx(4000 * 2 / 6, rel=0.1)


@pytest.mark.parametrize("active", [2, 4, 6])
def test_stages_take_turns(active):
    for each in draws(convnext(), active, "stage", 300):
        counts = Counter(unit.stage for unit in each)
        assert sum(counts.values()) == len(set(each)) == active
        assert max(counts.values()) == -(-active // 4)
        assert len(counts) == min(active, 4)


def test_a_budget_is_kept_but_for_a_block_that_has_more():
    units = convnext()
    budget = 2 * sum(unit.size for unit in units) / len(units)
    drawn = draws(units, 2, "param_budget", 1000)
    assert {unit for each in drawn for unit in each} == set(units)
    for each in drawn:
        assert len(each) == 1 or sum(unit.size for unit in each) <= budget
    # Blocks of one size leave nothing to tell apart.
    even = find_units(network("test_vit"))
    order = random.Random(1).sample(even, 6)
    for active in (1, 2, 6):
        assert choose(order, active, "param_budget") == choose(order, active, "uniform")


@pytest.mark.parametrize("sampling", _units.SAMPLINGS)
@pytest.mark.parametrize("active", [1, 2, 5])
def test_the_forecast_bounds_what_is_drawn(active, sampling):
    units = convnext()
    mean, most = choice_sizes(units, active, sampling)
    sizes = [sum(unit.size for unit in each) for each in draws(units, active, sampling)]
    assert max(sizes) <= most <= active * max(unit.size for unit in units)
    assert mean == pytest.approx(sum(sizes) / len(sizes), rel=0.1)
    if sampling == "uniform":
        expected = active * sum(unit.size for unit in units) / len(units)
        assert mean == pytest.approx(expected, rel=0.1)


def test_the_figures_of_the_guide():
    sizes = [choice_sizes(convnext(), 2, sampling)[1] / 4e6 for sampling in _units.SAMPLINGS]
    assert [round(size) for size in sizes] == [43, 30, 24]


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (DDPStrategy, "ddp_find_unused_parameters_true"),  # axolotl #1474
        (lambda: DDPStrategy(find_unused_parameters=True, static_graph=True), "static_graph"),
        (lambda: DeepSpeedStrategy.__new__(DeepSpeedStrategy), "DeepSpeedStrategy as"),  # 728
        (lambda: FSDPStrategy.__new__(FSDPStrategy), "FSDPStrategy as"),
        (FSDP2, "FSDP2 as"),
    ],
)
def test_728_strategies_that_fix_what_trains_are_refused(tmp_path, strategy, message):
    run = trainer(tmp_path)
    run._accelerator_connector.strategy = strategy()
    with pytest.raises(ValueError, match=message):
        LISA().setup(run, None, "fit")
    LISA().setup(run, None, "test")  # where nothing is frozen


@pytest.mark.parametrize(
    "strategy", [SingleDeviceStrategy, lambda: DDPStrategy(find_unused_parameters=True)]
)
def test_other_strategies_are_not(tmp_path, strategy):
    run = trainer(tmp_path)
    run._accelerator_connector.strategy = strategy()
    LISA().setup(run, None, "fit")


@pytest.mark.parametrize("tuning", [LoRA(rank=2), BitFit()])
def test_a_block_that_does_not_train_whole_is_named(base, tmp_path, tuning):
    with pytest.raises(ValueError, match=r"blocks\.0\.norm1\.weight is frozen: take litflora"):
        fit(base, tmp_path, LISA(), tuning=tuning)


def test_a_tuning_without_blocks_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"0 blocks train: .* litflora.adapters.Full"):
        fit(base, tmp_path, LISA(), tuning=Probe())
    with pytest.raises(ValueError, match=r"LISA.active is 7, and 6 blocks train.*blocks\.5"):
        fit(base, tmp_path, LISA(7))


class Filtered(ClassificationModule):
    """Whose optimizer never gets to know of a block."""

    def configure_optimizers(self):
        named = self.net.named_parameters()
        return torch.optim.AdamW([p for name, p in named if not name.startswith("blocks.3")])


def test_726_a_parameter_in_no_group_of_the_optimizer_is_named(base, tmp_path):
    options = {"class_names": NAMES, "img_size": SIZE, "tuning": Full()}
    made = Filtered("test_vit", 3, weights=str(base), **options)
    with pytest.raises(ValueError, match=r"blocks\.3\.norm1\.weight is in no group"):
        fit(base, tmp_path, LISA(), made=made)


def test_a_checkpoint_of_other_units_is_refused(base, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="one")
    fit(base, tmp_path, LISA(2, 2), keep, enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"LISA goes on with blocks\.\d, blocks\.\d, which a ch"):
        fit(base, tmp_path, LISA(2, 2, units=["mlp"]), ckpt_path=tmp_path / "one.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0}, "active must be at least 1"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"warmup": 20}, r"warmup must lie in \[0, interval 20\)"),
        ({"sampling": "weighted"}, "sampling is uniform, stage, param_budget, not 'weighted'"),
    ],
)
def test_settings_have_bounds(options, message):
    with pytest.raises(ValueError, match=message):
        LISA(**options)


@pytest.mark.filterwarnings("default:interval . leaves")
def test_what_is_unwise_is_said(base, tmp_path):
    with pytest.warns(UserWarning, match="interval 4 leaves the optimizer no time"):
        LISA(interval=4)
    made = module(base, tuning=Full())
    made.configure_model()
    made.net.compile(backend="eager")
    run = trainer(tmp_path)
    run.strategy.optimizers = [torch.optim.SGD(made.parameters())]
    with pytest.warns(UserWarning, match=r"torch\.compile compile anew"):
        LISA().on_fit_start(run, made)

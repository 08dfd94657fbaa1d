"""What several processes do: they evaluate each sample once, and train as one model."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import worlds
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from shell import QUIET, SMALL, files_below, litflora, litflora_process
from timm.layers import BatchNormAct2d
from tiny import NAMES, colours, module, save_base, trainer
from torch import nn

from litflora import ClassificationModule, DetectionModule, SegmentationModule
from litflora.adapters import BitFit, FLoRA, LoRA, NormTuning, Tuning, save
from litflora.average_precision import AveragePrecision
from litflora.callbacks import EMA, AdapterFolder, ConfusionMatrix
from litflora.datamodules import ShapesDetectionDataModule, ShapesSegmentationDataModule
from litflora.datamodules.base import ClassificationDataModule, Samples
from litflora.module import from_adapter
from litflora.processes import check_batch_norms, interleaved

pytestmark = pytest.mark.filterwarnings("ignore:weights is null")

SIZE = 32
SHAPES = {"weights": "embedded", "img_size": SIZE, "head_width": 32}
FEW = {"train_samples": 6, "img_size": SIZE, "batch_size": 2, "eval_batch_size": 2}
EAGER = {"box_score_thresh": 0.0, "box_detections_per_img": 6}  # a fresh head is unsure


class Noise(ClassificationDataModule):
    """Colours to tell apart, as bytes; predicted are those of the test."""

    class_names = NAMES

    def __init__(self, count: int, batch_size: int) -> None:
        super().__init__(batch_size)
        self.count = count

    def split(self, name: str) -> Samples:
        images, labels = colours(self.count, seed=len(name))
        names = [f"{number}.png" for number in range(self.count)]
        return Samples((images * 255).to(torch.uint8), labels.tolist(), names)


def spread_over(world: int) -> dict[str, object]:
    return {"devices": world, "strategy": "ddp" if world > 1 else "auto"}


# What the processes do ---------------------------------------------------------------------------

COUNTS = [(1000, 8), (997, 8), (7, 1)]


def evaluate(folder: Path, world: int) -> dict[str, object]:
    """What each case gives in ``world`` processes, beside the files that it leaves."""
    folder = folder / str(world)
    found = {f"{n} by {size}": classify(folder / str(n), world, n, size) for n, size in COUNTS}
    found["segmentation"] = dense(folder / "segmentation", world, *segmentation())
    found["detection"] = dense(folder / "detection", world, *detection())
    found["precision"] = precision(world)
    return found


def classify(folder: Path, world: int, count: int, batch_size: int) -> dict[str, object]:
    seed_everything(0)
    tuned, data = module(folder.parents[1] / "test_vit.safetensors"), Noise(count, batch_size)
    run = trainer(folder, **spread_over(world))
    (metrics,) = run.test(tuned, data, verbose=False)
    (matrix,) = [each for each in run.callbacks if isinstance(each, ConfusionMatrix)]
    counts = matrix.matrix.compute()
    run.predict(tuned, data, return_predictions=False)
    return {**metrics, "counts": counts}


def segmentation() -> tuple[LightningModule, ShapesSegmentationDataModule]:
    data = ShapesSegmentationDataModule("source", val_samples=5, test_samples=5, **FEW)
    return SegmentationModule("convnext_shapes", 11, head="linear", **SHAPES), data


def detection() -> tuple[LightningModule, ShapesDetectionDataModule]:
    data = ShapesDetectionDataModule("source", val_samples=5, test_samples=5, **FEW)
    options = {"detector": "mask_rcnn", "anchor_scale": 2.0, "detector_options": EAGER}
    return DetectionModule("convnext_shapes", 10, **options, **SHAPES), data


def dense(folder: Path, world: int, tuned: LightningModule, data: object) -> dict[str, object]:
    seed_everything(0)
    run = trainer(folder, **spread_over(world))
    (metrics,) = run.test(tuned, data, verbose=False)
    run.predict(tuned, data, return_predictions=False)
    return metrics


def precision(world: int) -> dict[str, torch.Tensor]:
    """Of nine images, some of them equal, spread over the processes."""
    rank = torch.distributed.get_rank() if world > 1 else 0
    metric = AveragePrecision(masks=True, per_class=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(9):
        found, target = scene(number % 4, generator)
        if number % world == rank:
            metric.update([found], [target])
    return metric.compute()


def scene(count: int, generator: torch.Generator) -> tuple[dict, dict]:
    """Objects, and what is found of them: a little beside, the scores in few steps."""
    corners = torch.randint(0, 16, (count, 2), generator=generator)
    masks = torch.zeros(count, SIZE, SIZE, dtype=torch.bool)
    for mask, (x, y) in zip(masks, corners.tolist(), strict=True):
        mask[y : y + 12, x : x + 12] = True
    labels = torch.randint(0, 2, (count,), generator=generator)
    target = {"boxes": torch.cat([corners, corners + 12], 1).float(), "labels": labels}
    target["masks"] = masks
    moved = target["boxes"] + torch.randint(-2, 3, (count, 4), generator=generator)
    scores = torch.randint(1, 4, (count,), generator=generator) / 4
    found = {"boxes": moved, "labels": labels, "scores": scores}
    return found | {"masks": masks.roll(1, 1)}, target


def fits(folder: Path) -> dict[str, dict[str, object]]:
    """A module of each task before and after training by two processes."""
    base, data = folder / "test_vit.safetensors", Noise(9, 2)
    averaged = module(base, tuning=LoRA(), mixup=0.2)
    return {
        "flora": fit(folder / "flora", module(base, tuning=FLoRA()), data),
        "ema": fit(folder / "ema", averaged, data, EMA(0.5)),
        "bitfit": fit(folder / "bitfit", module(base, tuning=BitFit()), data),
        "segmentation": fit(folder / "segmentation", *segmentation()),
        "detection": fit(folder / "detection", *detection()),
    }


def fit(folder: Path, tuned: LightningModule, data: object, *more: Callback) -> dict[str, object]:
    """The processes have different numbers of validation batches."""
    seed_everything(0)
    tuned.configure_model()
    before = copied(tuned)
    options = {"max_epochs": 3, "check_val_every_n_epoch": 2}  # training comes last
    callbacks = [AdapterFolder(), Silence(), *more]
    run = trainer(folder, callbacks=callbacks, **options, **spread_over(2))
    run.fit(tuned, data)
    frozen = {name for name, p in tuned.named_parameters() if not p.requires_grad}
    judged = {n: v for n, v in run.callback_metrics.items() if n.startswith("val/")}
    return {"before": before, "after": copied(tuned), "frozen": frozen, "judged": judged}


def copied(tuned: LightningModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tuned.state_dict().items()}


class Silence(Callback):
    """Fails if a batch of an evaluation would be a matter of all processes."""

    def on_validation_batch_start(self, trainer: Trainer, *args: object) -> None:
        assert not trainer.model.will_sync_module_buffers()

    def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
        assert trainer.model.forward_sync_buffers


def work(folder: Path) -> dict[str, dict[str, object]]:
    return {"evaluated": evaluate(folder, 2), "fitted": fits(folder)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    save_base(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return worlds.run(work, folder)


@pytest.fixture(scope="module")
def single(folder):
    return evaluate(folder, 1)


# Evaluation --------------------------------------------------------------------------------------


def test_two_processes_measure_what_one_does_bit_for_bit(ranks, single):
    for rank in ranks:
        for case, expected in single.items():
            found = rank["evaluated"][case]
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


def test_the_measures_say_something(single):
    assert 0 < single["1000 by 8"]["test/acc"] < 1
    assert single["1000 by 8"]["counts"].sum() == 1000
    assert 0 < single["segmentation"]["test/boundary_f"] < 1
    assert 0 < single["precision"]["box_map"] < single["precision"]["mask_map"] < 1


def test_two_processes_write_the_files_of_one(folder, ranks, single):
    files = files_below(folder / "1")
    assert files_below(folder / "2") == files
    for name in files:
        one, two = folder / "1" / name, folder / "2" / name
        assert one.is_dir() or one.read_bytes() == two.read_bytes(), name
    for count, _ in COUNTS:
        rows = (folder / "2" / str(count) / "predictions.csv").read_text().splitlines()[1:]
        assert [row.partition(",")[0] for row in rows] == [f"{i}.png" for i in range(count)]


def test_a_split_that_does_not_reach_all_processes_is_refused():
    data = Noise(1, 8)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 1})
    with pytest.raises(
        ValueError, match=r"val split has 1 samples, .* 2 .*: set trainer.devices to 1"
    ):
        data.setup("fit")


@pytest.mark.parametrize("lengths", [(3, 3), (3, 2), (1, 0), (2, 2, 1)])
def test_samples_are_put_in_one_order(lengths):
    parts = [range(rank, sum(lengths), len(lengths)) for rank in range(len(lengths))]
    assert list(interleaved(parts)) == list(range(sum(lengths)))


# Training ----------------------------------------------------------------------------------------

FITS = ["flora", "ema", "bitfit", "segmentation", "detection"]


@pytest.mark.parametrize("name", FITS)
def test_two_processes_train_one_model(name, ranks):
    one, two = (rank["fitted"][name] for rank in ranks)
    before, after = one["before"], one["after"]
    assert after.keys() == before.keys() == two["after"].keys()
    assert all(torch.equal(after[key], two["after"][key]) for key in after)  # buffers, too
    assert {key for key in after if torch.equal(after[key], before[key])} == one["frozen"]
    assert one["judged"] == two["judged"]


@pytest.mark.parametrize("name", FITS)
def test_the_adapter_of_two_processes_is_their_model(name, ranks, folder):
    after = ranks[1]["fitted"][name]["after"]
    saved = from_adapter(folder / name / "adapter")
    saved.configure_model()
    state = saved.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in after)


# Batch norms -------------------------------------------------------------------------------------


def with_batch_norms(tuning: Tuning) -> ClassificationModule:
    made = module(None, backbone="test_resnet", tuning=tuning)
    made.configure_model()
    return made


def test_frozen_batch_norms_stay_so_when_they_are_synchronized(tmp_path):
    """As Lightning converts them where there are GPUs."""
    for tuning, trains in ((NormTuning(), True), (FLoRA(), False)):
        made = with_batch_norms(tuning)
        keys, frozen = made.state_dict().keys(), made.frozen_keys()
        save(made.net, tmp_path / "before")
        made = nn.SyncBatchNorm.convert_sync_batchnorm(made).train()
        norms = [each for each in made.modules() if isinstance(each, nn.SyncBatchNorm)]
        assert norms
        assert all(norm.training == trains for norm in norms)
        assert (made.state_dict().keys(), made.frozen_keys()) == (keys, frozen)
        save(made.net, tmp_path / "after")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            before, after = (tmp_path / name / file for name in ("before", "after"))
            assert before.read_bytes() == after.read_bytes()
            before.unlink(), after.unlink()


def test_batch_norms_are_not_synchronized_on_cpus():
    made = module(None, backbone="test_resnet")
    made.trainer = trainer(Path(), strategy="ddp", devices=2, sync_batchnorm=True)
    with pytest.raises(ValueError, match="sync_batchnorm works on GPUs only"):
        made.configure_model()


def test_batch_norms_that_torch_would_rob_of_their_activation():
    strategy = SimpleNamespace(_layer_sync=object(), root_device=torch.device("cuda"))
    check_batch_norms(nn.BatchNorm2d(3), strategy)
    with pytest.raises(ValueError, match="no batch norms with an activation"):
        check_batch_norms(BatchNormAct2d(3), strategy)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(BatchNormAct2d(3)).eval()
    assert converted(-torch.ones(1, 3, 1, 1)).min() < 0  # else nothing would have to be refused


# The command line --------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_of_the_command_line_test_as_one(tmp_path):
    few = ("--data.train_samples", 4, "--data.val_samples", 2, "--data.test_samples", 21)
    runs = (*SMALL, "--trainer.default_root_dir", tmp_path)
    assert litflora("fit", "--config", "quickstart", *few, *runs).code == 0
    adapter = tmp_path / "quickstart" / "version_0" / "adapter"
    one = litflora("test", "--adapter", adapter, *runs)
    two = litflora_process("test", "--adapter", adapter, "--config", "trainer/ddp_cpu", *runs)
    assert (one.code, two.code) == (0, 0), two.err
    folders = (tmp_path / "test" / "version_0", tmp_path / "trainer" / "ddp_cpu" / "version_0")
    logs = [(folder / "metrics.csv").read_text() for folder in folders]
    assert logs[0] == logs[1]
    assert files_below(folders[0]) == files_below(folders[1])
    for line in ("data     21 test images", "test/acc"):
        assert one.out.count(line) == two.out.count(line) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--data.val_samples", 1), "the val split has 1 samples"),  # the first process knows
        (("--model.weights", "nowhere.safetensors"), "weights file nowhere"),  # and here all
    ],
)
def test_a_mistake_of_several_processes_is_told_once(options, said, tmp_path):
    runs = ("--config", "quickstart", "--config", "trainer/ddp_cpu", *QUIET)
    fit = litflora_process("fit", *runs, "--trainer.default_root_dir", tmp_path / "runs", *options)
    assert fit.code == 2
    assert fit.err.startswith(f"error: {said}")
    assert len(fit.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []

"""SourceMonitor: the right numbers, by a head that never changes, in a run that never notices."""

import csv

import pytest
import timm
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from tiny import NAMES, SIZE, Colours, colours, module, save_base, trainer

from litflora.adapters import FLoRA, Full, merge
from litflora.backbones.source import encoder
from litflora.callbacks import SourceMonitor
from litflora.callbacks.source_monitor import mean_features
from litflora.datamodules import ShapesDataModule, ShapesSegmentationDataModule
from litflora.datamodules.base import ClassificationDataModule, Samples
from litflora.heads.probes import LinearProbe, NearestNeighbours
from litflora.segmentation import SegmentationModule


class Tints(ClassificationDataModule):
    """Colours as litflora's own data give them; in training they would be inverted."""

    class_names = NAMES

    def split(self, name):
        images, labels = colours({"train": 20, "val": 3, "test": 12}[name], seed=len(name))
        names = [str(n) for n in range(len(images))]
        flip = (lambda image: 1 - image) if name == "train" else None
        return Samples(images, labels.tolist(), names, flip)


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path, num_classes=3)


def fit(weights, folder, *callbacks, ckpt_path=None, **options):
    settings = {"tuning": FLoRA(rank=2, dropout=0.2), "lr": 0.01, "head_lr": 0.01}
    settings |= {key: options.pop(key) for key in ("tuning", "backbone") if key in options}
    torch.manual_seed(0)
    made = module(weights, **settings)
    run = trainer(folder, callbacks=list(callbacks), **{"max_epochs": 2, **options})
    run.fit(made, Colours(root=str(folder)), ckpt_path=ckpt_path, weights_only=True)
    return made, run


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).double().mean().item()


def source_model(base):
    net = timm.create_model("test_vit", num_classes=3, img_size=SIZE).eval()
    resampled = module_of(base).net.pos_embed
    net.load_state_dict({**load_file(base), "pos_embed": resampled})
    return net


def module_of(base, **options):
    made = module(base, **options)
    made.configure_model()
    return made.eval()


@pytest.mark.parametrize("tuning", [FLoRA(rank=2), Full()], ids=["FLoRA", "Full"])
def test_the_original_head_judges_the_tuned_backbone(base, tmp_path, tuning, capsys):
    monitor = SourceMonitor(Tints())
    made, run = fit(base, tmp_path, monitor, tuning=tuning)
    images, labels = colours(12, seed=len("test"))
    net = source_model(base)
    with torch.no_grad():
        before = accuracy(net(made.normalize(images)), labels)
        if isinstance(tuning, FLoRA):
            merge(made.net, unload=True)
        tuned = made.net.state_dict()
        heads = {key: value for key, value in net.state_dict().items() if key.startswith("head.")}
        net.load_state_dict({**tuned, **heads})
        now = accuracy(net(made.normalize(images)), labels)
    assert monitor.before == before
    assert run.callback_metrics["source/acc"].item() == pytest.approx(now)
    assert run.callback_metrics["source/forgotten"].item() == pytest.approx(before - now)
    assert now != before  # or it could not tell the two apart
    told = f"source   {before:.4f} before tuning, {now:.4f} after: {before - now:.4f} forgotten"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("head", "kind"), [("knn", NearestNeighbours), ("probe", LinearProbe)], ids=["knn", "probe"]
)
def test_a_fitted_head_is_that_of_the_base(base, tmp_path, head, kind, monkeypatch):
    fits = []
    plain = kind.__init__
    monkeypatch.setattr(kind, "__init__", lambda *args: fits.append(args[1]) or plain(*args))
    monitor = SourceMonitor(Tints(), head=head)
    made, run = fit(base, tmp_path, monitor)
    assert len(fits) == 1  # never again
    start, learnt, asked = module_of(base), colours(20, seed=len("train")), colours(12, seed=4)
    features = [
        mean_features(encoder(each.eval().net), each.normalize(images)).detach()
        for each, images in ((start, learnt[0]), (start, asked[0]), (made, asked[0]))
    ]
    torch.testing.assert_close(fits[0], features[0])  # of images without augmentation
    fitted = kind(features[0], learnt[1], 3)
    assert monitor.before == accuracy(fitted(features[1]), asked[1])
    now = accuracy(fitted(features[2]), asked[1])
    assert run.callback_metrics["source/acc"].item() == pytest.approx(now)


class Traces(Callback):
    """What a callback may have moved: random states, modes and buffers, whenever it is asked."""

    def __init__(self):
        self.seen = []

    def look(self, trainer, pl_module, *_):
        modes = [each.training for each in pl_module.modules()]
        buffers = [buffer.clone() for buffer in pl_module.buffers() if buffer.is_floating_point()]
        self.seen.append((torch.get_rng_state(), modes, buffers))

    on_fit_start = on_train_start = on_train_epoch_end = look


@pytest.mark.parametrize(
    ("head", "options"),
    [("original", {}), ("probe", {"tuning": Full(), "backbone": "test_resnet"})],
    ids=["dropout", "batch_norms"],
)
def test_a_run_is_bit_for_bit_what_it_is_without(tmp_path, head, options):
    weights = save_base(tmp_path, options.get("backbone", "test_vit"), num_classes=3)
    alone, plain = fit(weights, tmp_path, Traces(), **options)
    traces = Traces(), Traces()
    watched, run = fit(
        weights, tmp_path, traces[0], SourceMonitor(Tints(), head), traces[1], **options
    )
    for before, after in zip(traces[0].seen, traces[1].seen, strict=True):
        assert torch.equal(before[0], after[0])
        assert before[1] == after[1]
        assert all(map(torch.equal, before[2], after[2]))
    state = watched.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in alone.state_dict().items())
    for name, value in plain.callback_metrics.items():
        assert run.callback_metrics[name] == value
    assert {*run.callback_metrics} - {*plain.callback_metrics} == {
        "source/acc",
        "source/forgotten",
    }


@pytest.mark.parametrize(
    ("every", "length", "steps"),
    [(2, {"max_epochs": 3}, [0, 5, 8]), (9, {"max_epochs": -1, "max_steps": 5}, [0, 4])],
    ids=["epochs", "steps"],
)
def test_it_logs_the_start_and_every_so_many_epochs_and_the_last(
    base, tmp_path, every, length, steps
):
    logger = CSVLogger(tmp_path)
    monitor = SourceMonitor(Tints(), every_n_epochs=every)
    fit(base, tmp_path, monitor, logger=logger, **length)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["source/acc"]]
    assert [int(row["step"]) for row in rows] == steps
    assert float(rows[0]["source/acc"]) == pytest.approx(monitor.before)
    for row in rows:
        lost = monitor.before - float(row["source/acc"])
        assert float(row["source/forgotten"]) == pytest.approx(lost, abs=1e-6)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_start(base, tmp_path):
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, again = (SourceMonitor(Tints(), head="knn") for _ in range(2))
    options = {"tuning": Full(), "enable_checkpointing": True}
    _, first = fit(base, tmp_path, whole, every, **options)
    _, second = fit(base, tmp_path, again, ckpt_path=tmp_path / "epoch=0.ckpt", **options)
    assert again.before == whole.before
    assert torch.equal(again._classify.features, whole._classify.features)  # those of the base
    assert first.callback_metrics["source/acc"] == second.callback_metrics["source/acc"]


def test_samples_are_spread_over_the_split():
    monitor = SourceMonitor(Tints(), limit=4)
    monitor.data.setup("test")
    labels = [
        label for _, labels in monitor._batches(monitor.data.datasets["test"]) for label in labels
    ]
    assert labels == [0, 0, 0, 0]  # each third of the classes' round: 0, 3, 6, 9


def shapes_run(folder, monitor, **options):
    small = {"train_samples": 4, "val_samples": 2, "img_size": 64, "batch_size": 2}
    data = ShapesSegmentationDataModule(**small, eval_batch_size=2)
    settings = {"backbone": "convnext_shapes", "weights": "embedded", "head": "linear"}
    made = SegmentationModule(num_classes=data.num_classes, **{**settings, **options})
    run = trainer(folder, callbacks=[monitor], num_sanity_val_steps=0)
    torch.manual_seed(0)
    run.fit(made, data)
    return made, run


def test_a_segmentation_forgets_classes_by_the_weights_own_head(tmp_path):
    source = ShapesDataModule(domain="source", test_samples=16, batch_size=8)
    monitor = SourceMonitor(source)
    made, run = shapes_run(tmp_path, monitor, tuning=Full(), lr=0.1, lr_scheduler=None)
    images, labels, _ = zip(*source.datasets["test"], strict=True)
    net = timm.create_model("convnext_shapes", pretrained=True).eval()
    with torch.no_grad():
        inputs = made.normalize(torch.stack(images))
        assert monitor.before == accuracy(net(inputs), torch.tensor(labels)) > 0.7
        tuned = made.net.pyramid.backbone.state_dict()
        assert not net.load_state_dict(tuned, strict=False).unexpected_keys
        now = accuracy(net(inputs), torch.tensor(labels))
    assert run.callback_metrics["source/acc"].item() == pytest.approx(now)
    assert now < monitor.before


def test_blocks_that_the_head_stands_on_must_be_there(tmp_path):
    weights = str(save_base(tmp_path, num_classes=3))
    cut = {"backbone": "test_vit", "weights": weights, "blocks": [1, 3]}
    with pytest.raises(ValueError, match="leaves out blocks or norms that the head of test_vit"):
        shapes_run(tmp_path, SourceMonitor(Tints()), **cut)


def test_mistakes_are_said_before_training(base, tmp_path):
    with pytest.raises(ValueError, match="head must be original or knn or probe"):
        SourceMonitor(Tints(), head="linear")
    with pytest.raises(ValueError, match="must be at least 1"):
        SourceMonitor(Tints(), limit=0)
    with pytest.raises(ValueError, match="Colours is no classification datamodule of litflora"):
        SourceMonitor(Colours())
    with pytest.raises(ValueError, match="a run has one SourceMonitor"):
        fit(base, tmp_path, SourceMonitor(Tints()), SourceMonitor(Tints(), head="knn"))
    with pytest.raises(ValueError, match="weights is null"):
        fit(None, tmp_path, SourceMonitor(Tints()))
    five = save_base(tmp_path, num_classes=5)
    with pytest.raises(ValueError, match="has 5 classes, and the source data 3"):
        fit(five, tmp_path, SourceMonitor(Tints()))
    headless = save_base(tmp_path, num_classes=0)
    with pytest.raises(ValueError, match="bring no classifier: take head knn or probe"):
        fit(headless, tmp_path, SourceMonitor(Tints()))

"""The drawn data set and the network that is shipped for it."""

import sys
from pathlib import Path
from runpy import run_path

import pytest
import timm
import torch

from litflora.backbones.embedded import WEIGHTS
from litflora.datamodules import ShapesDataModule
from litflora.datamodules.scenes import KINDS

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_shapes.py"
SMALL = {"train_samples": 60, "val_samples": 20, "test_samples": 30}


@pytest.mark.parametrize("domain", ["source", "shifted"])
def test_splits_have_their_sizes_and_balanced_labels(domain: str) -> None:
    data = ShapesDataModule(domain, **SMALL, img_size=32)
    data.setup()
    assert data.class_names == list(KINDS)
    assert data.num_classes == 10
    for name, count in {"train": 60, "val": 20, "test": 30}.items():
        samples = data.datasets[name]
        assert samples.images.shape == (count, 3, 32, 32)
        assert samples.images.dtype == torch.uint8
        assert torch.bincount(torch.tensor(samples.labels)).tolist() == [count // 10] * 10


def test_a_sample_does_not_depend_on_how_many_there_are() -> None:
    few, many = (ShapesDataModule(test_samples=count) for count in (10, 20))
    few.setup("test")
    many.setup("test")
    assert torch.equal(few.datasets["test"].images, many.datasets["test"].images[:10])


def test_splits_and_seeds_differ() -> None:
    first, second = (ShapesDataModule(**SMALL, seed=seed) for seed in (0, 1))
    first.setup()
    second.setup()
    views = [samples.images[:20] for data in (first, second) for samples in data.datasets.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(views) for b in views[i + 1 :])


def test_batches() -> None:
    data = ShapesDataModule(**SMALL, batch_size=8)
    data.setup("fit")
    data.setup("predict")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 64, 64)
    assert labels.dtype == torch.int64
    _, labels = next(iter(data.val_dataloader()))
    assert labels.tolist() == list(range(8))
    _, names = next(iter(data.predict_dataloader()))
    assert names[:2] == ["test/00000", "test/00001"]


def test_a_stage_draws_no_more_than_it_needs() -> None:
    data = ShapesDataModule(**SMALL)
    data.setup("validate")
    assert list(data.datasets) == ["val"]
    drawn = data.datasets["val"]
    data.setup("fit")
    assert data.datasets["val"] is drawn


def test_unknown_domain() -> None:
    with pytest.raises(ValueError, match=r"'dark' is none of source, shifted"):
        ShapesDataModule("dark")


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        ShapesDataModule(val_samples=0)


@pytest.mark.parametrize(("domain", "low", "high"), [("source", 0.95, 1), ("shifted", 0.3, 0.65)])
def test_the_embedded_network_knows_the_source_but_not_the_shifted_domain(
    domain: str, low: float, high: float
) -> None:
    net = timm.create_model("convnext_shapes", pretrained=True).eval()
    data = ShapesDataModule(domain, test_samples=300, batch_size=100)
    data.setup("test")
    with torch.inference_mode():
        hits = [net(x / 127.5 - 1).argmax(1) == y for x, y in data.test_dataloader()]
    assert low <= torch.cat(hits).float().mean() <= high


def test_the_embedded_weights_are_small_enough_to_ship() -> None:
    assert WEIGHTS.stat().st_size < 1.2e6


@pytest.mark.slow
def test_the_script_remakes_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "net.safetensors"
    options = ["--samples", "60", "--epochs", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    run_path(str(SCRIPT), run_name="__main__")
    overlay = {"file": str(out)}
    net = timm.create_model("convnext_shapes", pretrained=True, pretrained_cfg_overlay=overlay)
    assert net.num_classes == 10
    assert list(tmp_path.iterdir()) == [out]

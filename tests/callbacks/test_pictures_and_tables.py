import csv

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tiny import NAMES, Colours, module, save_base, trainer

from litflora.callbacks import ConfusionMatrix, RateProgressBar
from litflora.callbacks.confusion import draw


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path)


def table(path):
    with path.open() as file:
        return list(csv.reader(file))


def test_the_confusion_matrix_counts_and_is_drawn(base, tmp_path):
    run = trainer(tmp_path / "run")
    (metrics,) = run.test(module(base), Colours(n=10), verbose=False)
    callback = next(each for each in run.callbacks if isinstance(each, ConfusionMatrix))
    counts = callback.matrix.compute()
    assert counts.sum() == 10
    assert counts.diag().sum() / 10 == pytest.approx(metrics["test/acc"])
    assert counts.sum(1).tolist() == [4, 3, 3]  # rows are the true classes
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["confusion_matrix.png"]
    assert Image.open(tmp_path / "run" / "confusion_matrix.png").size > (300, 300)


def test_the_picture_reaches_loggers_that_take_figures(base, tmp_path, monkeypatch):
    logger = TensorBoardLogger(tmp_path / "logs")
    seen = []
    monkeypatch.setattr(
        logger.experiment, "add_figure", lambda name, figure, step: seen.append(name)
    )
    run = trainer(tmp_path, logger=logger)
    run.test(module(base), Colours(n=10), verbose=False)
    assert seen == ["test/confusion_matrix"]


@pytest.mark.parametrize("classes", [2, 20, 100, 1000])
def test_the_picture_is_readable_for_any_number_of_classes(classes, tmp_path):
    figure = draw(torch.eye(classes, dtype=torch.long), [f"class {i}" for i in range(classes)])
    figure.savefig(tmp_path / "it.png", bbox_inches="tight")
    width, height = Image.open(tmp_path / "it.png").size
    assert max(width, height) < 4000
    (axes, _) = figure.axes
    ticks = [label for label in axes.get_xticklabels() if label.get_text().startswith("class")]
    assert len(ticks) == (classes if classes <= 120 else 0)
    assert len(axes.texts) == (classes**2 if classes <= 20 else 0)
    if ticks:  # neighbouring names do not overlap: a point is 1/72 inch
        pitch = figure.get_figwidth() * 72 * 0.7 / classes
        assert 3.0 <= ticks[0].get_fontsize() <= pitch


def test_predictions_are_a_table(base, tmp_path, capsys):
    run = trainer(tmp_path / "run")
    batches = run.predict(module(base), Colours(n=10, batch_size=4))
    path = tmp_path / "run" / "predictions.csv"
    header, *rows = table(path)
    assert header == ["path", "predicted", *NAMES]
    assert [row[0] for row in rows] == [f"image {i}.png" for i in range(10)]
    probs = torch.cat([batch["probs"] for batch in batches])
    assert torch.allclose(torch.tensor([[*map(float, row[2:])] for row in rows]), probs, atol=1e-6)
    assert [row[1] for row in rows] == [NAMES[i] for i in probs.argmax(1)]
    assert f"10 predictions are in {path}" in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir()] == ["predictions.csv"]


def test_a_failing_write_leaves_the_old_table(base, tmp_path, monkeypatch):
    path = tmp_path / "predictions.csv"
    path.write_text("old")
    run = trainer(tmp_path)

    class Full:
        def writerows(self, rows):
            raise OSError("disk full")

    monkeypatch.setattr("litflora.adapters.replacing.csv.writer", lambda file: Full())
    with pytest.raises(OSError, match="disk full"):
        run.predict(module(base), Colours(n=4))
    assert path.read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} == {"predictions.csv", base.name}


def test_the_progress_bar_shows_images_a_second(base, tmp_path, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr("litflora.callbacks.progress.time.perf_counter", lambda: next(now))
    bar = RateProgressBar()
    run = trainer(tmp_path, callbacks=[bar], enable_progress_bar=True)
    seen = []
    update = bar.get_metrics
    monkeypatch.setattr(bar, "get_metrics", lambda *args: seen.append(update(*args)) or seen[-1])
    run.fit(module(base), Colours(n=24, batch_size=8))
    rates = [metrics["images/s"] for metrics in seen if "images/s" in metrics]
    assert rates
    assert set(rates) == {"8"}  # the clock ticks once a batch


def test_a_log_gets_a_line_for_each_epoch(base, tmp_path, capsys):
    run = trainer(tmp_path, callbacks=[RateProgressBar()], enable_progress_bar=True, max_epochs=2)
    run.fit(module(base), Colours(n=8, batch_size=8))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    loss = run.callback_metrics["train/loss"].item()
    assert [line.split(": ")[0].split()[1] for line in lines] == ["0", "1"]
    assert f"train/loss {loss:.4g}, " in lines[-1]
    assert "images/s " in lines[-1]

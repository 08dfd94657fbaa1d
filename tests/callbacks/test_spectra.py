"""Spectra: the table and the picture that a fit leaves, of deltas and of what trained in place."""

import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from shell import litflora
from tiny import Colours, module, save_base, trainer

from litflora.adapters import FLoRA, Full, LoRA, NormTuning, PerModule, spectra
from litflora.callbacks import AdapterFolder, Spectra

pytestmark = pytest.mark.filterwarnings("ignore:weights is null")


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path)


def fit(folder, weights, tuning, *callbacks, **options):
    torch.manual_seed(0)
    made = module(weights, tuning=tuning)
    run = trainer(folder, callbacks=[Spectra(), *callbacks], **options)
    run.fit(made, Colours(root=str(folder)))
    return made


def table(folder):
    with (folder / "spectra.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder and module of a run for each of two tunings, and the base's file."""
    folder = tmp_path_factory.mktemp("runs")
    base = save_base(folder)
    tunings = {"FLoRA": FLoRA(rank=2), "Full": Full()}
    made = {n: (folder / n, fit(folder / n, base, t, AdapterFolder())) for n, t in tunings.items()}
    return made, base


def test_deltas_leave_a_table_and_a_picture(runs):
    folder, made = runs[0]["FLoRA"]
    rows, expected = table(folder), spectra(made.net).rows
    assert [row["weight"] for row in rows] == [row.name for row in expected]
    assert [row["rank"] for row in rows] == ["x".join(map(str, row.ranks())) for row in expected]
    norms = [float(row["relative_norm"]) for row in rows]
    assert norms == pytest.approx([row.relative_norm for row in expected], rel=1e-4)
    assert min(norms) > 0
    assert {file.name for file in folder.iterdir()} == {"adapter", "spectra.csv", "spectra.png"}
    assert Image.open(folder / "spectra.png").size > (600, 300)


def test_an_adapter_is_saved_before_its_spectra_can_fail(base, tmp_path, monkeypatch):
    monkeypatch.setattr("litflora.callbacks.spectra.measure", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "run", base, LoRA(rank=2), AdapterFolder())
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_full_tuning_is_compared_with_its_file(runs):
    made, base = runs
    folder, module = made["Full"]
    before, after = load_file(base), module.net.state_dict()
    rows = {row["weight"]: float(row["relative_norm"]) for row in table(folder)}
    matrices = {name for name, value in before.items() if value.dim() > 1}
    assert rows.keys() == matrices - {"head.weight"}  # which began at random
    assert rows.pop("pos_embed") > 0  # resampled to smaller images
    for name, norm in rows.items():
        change = (after[name] - before[name]).norm() / before[name].norm()
        assert norm == pytest.approx(change.item(), rel=1e-4), name


def test_what_trained_in_place_beside_adapters_counts_too(base, tmp_path):
    parts = {"blocks.0": FLoRA(rank=2), "blocks.1": Full()}
    fit(tmp_path / "run", base, PerModule(parts))
    named = {
        row["weight"].partition(".attn")[0].partition(".mlp")[0] for row in table(tmp_path / "run")
    }
    assert named == {"blocks.0", "blocks.1"}


def test_where_no_matrix_changed_there_is_no_picture(base, tmp_path):
    fit(tmp_path / "run", base, NormTuning())
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["spectra.csv"]
    assert table(tmp_path / "run") == []


def test_where_nothing_changed_there_is_no_picture_either(base, tmp_path):
    fit(tmp_path / "run", base, LoRA(rank=2), max_steps=0)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["spectra.csv"]
    assert {row["relative_norm"] for row in table(tmp_path / "run")} == {"0"}


def test_the_picture_reaches_loggers_that_take_figures(base, tmp_path, monkeypatch):
    logger, seen = TensorBoardLogger(tmp_path / "logs"), []
    monkeypatch.setattr(logger.experiment, "add_figure", lambda name, *_: seen.append(name))
    monkeypatch.setattr("litflora.callbacks.spectra.draw", lambda report: Figure())
    fit(tmp_path, base, FLoRA(rank=2), logger=logger)
    assert seen == ["spectra"]


def test_what_has_no_base_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="Spectra compares with the base"):
        fit(tmp_path, None, Full())
    fit(tmp_path, None, FLoRA(rank=2), fast_dev_run=True)  # a delta is all that it needs


def test_a_model_in_parts_is_refused():
    sharded = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match=r"take trainer\.strategy ddp"):
        Spectra().setup(sharded, None, "fit")


def test_nothing_is_written_by_a_smoke_test(base, tmp_path):
    fit(tmp_path / "run", base, FLoRA(rank=2), fast_dev_run=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tuning", ["FLoRA", "Full"])
def test_inspect_prints_those_of_a_saved_adapter(runs, tuning):
    folder, _ = runs[0][tuning]
    told = litflora("inspect", folder / "adapter", "--spectra")
    assert told.code == 0, told.err
    _, _, shown = told.out.partition("|dW|/|W|")
    for row in table(folder):
        (line,) = (line for line in shown.splitlines() if line.startswith(row["weight"] + " "))
        told = [row["shape"], row["rank"], f"{float(row['relative_norm']):.2e}", row["intruders"]]
        assert line.split()[2:] == told


def test_inspect_has_no_spectra_of_a_recipe():
    refused = litflora("inspect", "classification/shapes", "--spectra")
    assert refused.code == 2
    assert "give the folder of a saved adapter" in refused.err

"""The study: rates are added until the best has both neighbours; its tables say what runs left."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import study
import study_tables
from matplotlib.axes import Axes

from litflora.commands import recipes
from litflora.commands.compare import axes


@pytest.mark.parametrize(
    ("tried", "best", "then"),
    [
        ((3e-3, 1e-2), 1e-2, (3e-3, 1e-2, 3e-2)),
        ((3e-3, 1e-2, 3e-2), 1e-2, (3e-3, 1e-2, 3e-2)),
        ((1e-5, 3e-5), 1e-5, (1e-5, 3e-5)),
    ],
)
def test_a_rate_gets_neighbours(tried: tuple, best: float, then: tuple) -> None:
    assert study.with_neighbours(tried, best) == then


def test_the_search_ends_where_both_neighbours_are_worse(monkeypatch) -> None:
    values = {1e-4: 0.1, 3e-4: 0.2, 1e-3: 0.4, 3e-3: 0.5, 1e-2: 0.3}
    asked = []
    monkeypatch.setattr(study, "chosen", lambda _: {"LoRA": max(asked[-1], key=values.get)})

    def run(rates: dict, seeds: list) -> None:
        assert seeds == [0]
        asked.append(rates["LoRA"])

    assert study.search({"LoRA": (1e-4, 3e-4)}, [0, 1], Path(), run) == {"LoRA": 3e-3}
    assert [rates[-1] for rates in asked] == [3e-4, 1e-3, 3e-3, 1e-2]


def test_the_rate_of_the_head_is_searched_without_the_one_of_the_recipe(
    monkeypatch, tmp_path: Path
) -> None:
    asked = {}

    def compare(target, rates, seeds, out: Path, options, overlays=()) -> None:
        asked[out.name] = options["model.init_args.head_lr"]
        out.mkdir(exist_ok=True)
        (out / "results.csv").touch()

    def search(rates, seeds, out, run) -> dict[str, float]:
        run(rates, seeds)
        return dict.fromkeys(rates, 0.02)

    for name, stand_in in {"compare": compare, "search": search, "show": print}.items():
        monkeypatch.setattr(study, name, stand_in)
    here = str(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study.py", "camvid_vit_tiny", "--data", here, "--out", here])
    study.main()
    assert asked == {"head": "null", "methods": 0.02}


def test_every_recipe_of_the_study_is_there() -> None:
    for target in study.TARGETS.values():
        for name in target.rates:
            named = study.tuning(name)
            own = (study.HERE / named).is_file()
            assert own or name in axes.known() or recipes.find(name).is_file()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A compare of a probe and of LoRA with two seeds."""
    keys = ("tuning", "rank", "lr", "seed", "chosen", "val/acc", "test/acc", "parameters", "folder")
    rows = [
        ("Probe", "", "0.002", 0, 1, 0.5, 0.4, 100, "a"),
        ("Probe", "", "0.002", 1, 1, 0.6, 0.5, 100, "b"),
    ]
    rows += [("LoRA", 8, "0.001", seed, 1, 0.7, 0.6, 350, f"c{seed}") for seed in (0, 1)]
    rows += [("LoRA", 8, "0.01", 0, 0, 0.65, "", 350, "d")]
    rows += [("LoRA", 8, "0.1", 0, 0, "nan", "", 350, "c0")]
    with (tmp_path / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([keys, *rows])
    for seed, lost in enumerate((0.02, 0.04)):
        (folder := tmp_path / f"c{seed}").mkdir()
        (folder / "metrics.csv").write_text(f"step,source/forgotten\n0,0.0\n9,{lost}\n9,\n")
        table = "weight,rank,relative_norm,intruders\na,4x3,0.5,1\nb,2x9,0.7,2\n"
        (folder / "spectra.csv").write_text(table)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.csv").write_text("step,val/acc\n9,0.5\n")
    return tmp_path


def test_a_row_has_means_over_seeds(out: Path) -> None:
    found = study_tables.results(out)
    *_, probe, lora = study_tables.table(found).splitlines()
    assert probe.split(" | ")[1:4] == ["", "0", "55.00 ± 7.07"]
    cells = lora.strip("| ").split(" | ")
    assert cells[:3] == ["LoRA", "0.001", "250"]
    assert cells[4:] == ["60.00 ± 0.00", "60.0, 60.0", "3.00 ± 1.41", "3", "0.6", "3"]


def test_the_rates_that_were_tried(out: Path) -> None:
    found = [each for each in study_tables.tries(out / "results.csv", out) if each.name == "LoRA"]
    assert study_tables.tried(found[:1] + found[2:]).splitlines() == [
        "| tuning | 0.001 | 0.01 | 0.1 |",
        "|---|---|---|---|",
        "| LoRA | **70.0** (2.0) | 65.0 | nan |",
    ]


def test_the_picture_has_forgetting_where_it_was_asked_for(out: Path) -> None:
    found, rates = study_tables.results(out), study_tables.tries(out / "results.csv", out)
    parameters, forgotten, at_each_rate = study_tables.draw(found, rates).axes
    assert _places(parameters) == [[1e3, 45], [250, 60]]
    assert _places(forgotten) == [[pytest.approx(3), 60]]
    (line,) = at_each_rate.lines
    assert line.get_xydata() == pytest.approx(np.array([[2, 70], [4, 70]]))
    assert len(study_tables.draw(found, rates[:2]).axes) == 1


def _places(axis: Axes) -> list[list[float]]:
    return [bars[0].get_xydata()[0].tolist() for bars in axis.containers]


def test_a_method_without_a_rate_ends_the_study(monkeypatch) -> None:
    monkeypatch.setattr(study, "chosen", lambda _: {})
    with pytest.raises(SystemExit, match="DoRA: no rate that was tried has ended well"):
        study.search({"DoRA": (1e-3,)}, [0], Path(), lambda *_: None)

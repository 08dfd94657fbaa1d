"""What the runs of a compare come to: the rows of its tables, and how far it is."""

import csv
import math

import pytest

from litflora.commands.compare import gathered, results
from litflora.commands.compare.plan import Cell, Run

LISA = {"class_path": "litflora.callbacks.LISA"}


def rows(tmp_path, fits, tests=(), callbacks=None, seeds=1):
    """The rows of one tuning.

    Args:
        fits: What each run has reached by validation; None if it was not done, or why it failed.
        tests: What each has reached in its test, if it was chosen; None before.
    """
    settings = {"trainer": {"callbacks": callbacks}, "data": {"class_path": "x.Shapes"}}
    runs = [Run("LoRA", 8, n // seeds, n % seeds, "r", (), settings) for n in range(len(fits))]
    by_rate = {run.rate: [other for other in runs if other.rate == run.rate] for run in runs}
    cell = Cell("LoRA", 8, None, by_rate)
    figures = {"metric": "val/acc", "parameters": 10, "saved_bytes": 5, "seconds": 1.0}
    found = []
    for n, (run, val) in enumerate(zip(runs, fits, strict=True)):
        error, fit = (val, {}) if isinstance(val, str) else ("", {"val": val, **figures})
        test = {"test": tests[n]} if n < len(tests) and tests[n] is not None else {}
        fit = {} if val is None else fit
        found.append(results.Row(cell, run, n < len(tests), fit, test, error, tmp_path / str(n)))
    return found


@pytest.mark.parametrize(
    ("fits", "why"),
    [
        ([math.nan, math.nan], "diverged at every rate"),
        (["broke", "broke"], "failed at every rate"),
        ([math.nan, "broke"], "diverged or failed at every rate"),
    ],
)
def test_a_tuning_without_a_rate_has_a_row(fits, why, tmp_path):
    (point,) = gathered.points(rows(tmp_path, fits))
    assert point.lost == why
    assert math.isnan(point.val[0])
    assert not point.whole
    assert point.cells(forgetting=False)[3] == why
    assert gathered.points(rows(tmp_path, [*fits, None])) == []  # one may still come to a number


@pytest.mark.parametrize(
    ("fits", "tests", "said"),
    [
        ([0.5, None, None], [], "Unfinished: 1 of 3 runs done."),
        ([0.5, 0.4, "broke"], [0.5], "Unfinished: 2 of 3 runs done, 1 failed."),
        ([0.5, 0.4], [None], "Unfinished: 2 of 2 runs done, 0 of 1 tests done."),
        ([0.5, 0.4], [0.5], ""),
        ([math.nan], [], ""),
    ],
)
def test_how_far_a_compare_is(fits, tests, said, tmp_path):
    assert gathered.report(rows(tmp_path, fits, tests), "c").progress == said


def test_all_tunings_are_known_with_their_tries_and_what_changes_their_costs(tmp_path):
    found = gathered.report(rows(tmp_path, [None] * 4, callbacks=[LISA], seeds=2), "c")
    assert found.tunings == {"LoRA": 2}
    assert found.changing == {"LoRA": "LISA"}
    assert gathered.report(rows(tmp_path, [None]), "c").changing == {}


def test_what_was_forgotten_is_in_the_tables(tmp_path):
    found = rows(tmp_path, [0.5, None], [0.4])
    results.write_tables(found, tmp_path, "c")
    assert "source" not in (tmp_path / "results.csv").read_text()
    (tmp_path / "0").mkdir()
    logged = "step,source/acc,source/forgotten\n0,0.9,0.0\n9,0.8,0.1\n12,0.7,0.2\n"
    (tmp_path / "0" / "metrics.csv").write_text(logged)
    results.write_tables(found, tmp_path, "c")
    with (tmp_path / "results.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["source/acc"], first["source/forgotten"]) == ("0.7", "0.2")
    assert (second["source/acc"], second["folder"]) == ("", "1")
    assert "| 0.4000 | 0.5000 | 0.2000 |" in (tmp_path / "results.md").read_text()
    assert "forgotten" in results.told(found, tmp_path)


def test_a_run_that_diverged_has_forgotten_no_known_amount(tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "metrics.csv").write_text("step,source/forgotten\n0,0.0\n")
    diverged, ended = rows(tmp_path, [math.nan, 0.5])
    assert diverged.last("source/forgotten") is None
    assert ended.last("source/forgotten") == 0.0

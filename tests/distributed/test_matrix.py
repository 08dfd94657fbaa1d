"""The support matrix of the docs is what these runs found: a part of it in each test run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import worlds

from . import matrix, work

ROOT = Path(__file__).resolve().parents[2]
Results = dict[matrix.Cell, matrix.Result]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("single")
    matrix.save_language(folder)
    return {cell: matrix.run(cell, folder) for cell in matrix.some("single")}


@pytest.fixture(scope="module")
def page() -> str:
    return matrix.in_docs((ROOT / "docs" / "scaling.md").read_text())


def check_cells(results: Results) -> None:
    for cell, result in results.items():
        assert matrix.works(result) or result.refused, (cell, result)
        mixed = cell[3] != "bf16-true"  # whose steps are often too small to change a weight
        if result.losses and mixed and cell[0] != "detection":
            assert result.moved[0] == result.trained, (cell, result)


def check_strategies(results: Results) -> None:
    for (task, tuning, strategy, precision), result in results.items():
        close = {"32-true": 1e-5, "bf16-mixed": 1e-2, "bf16-true": 3e-2}[precision]
        if strategy == "fsdp2" and result.losses:
            ddp = results[task, tuning, "ddp", precision]
            assert result.losses == pytest.approx(ddp.losses, rel=close), (task, tuning, precision)


def test_each_cell_trains_or_says_why_not(alone: Results, two: Any) -> None:
    check_cells({**alone, **two[0]["cells"]})


def test_ranks_agree_bit_for_bit(two: Any) -> None:
    assert two[0]["cells"] == two[1]["cells"]


def test_strategies_agree(two: Any) -> None:
    check_strategies(two[0]["cells"])


def test_the_docs_say_so(alone: Results, two: Any, page: str) -> None:
    results, told = {**alone, **two[0]["cells"]}, matrix.told(page)
    assert set(told) == set(matrix.cells("single", *work.TWO))
    assert {cell: told[cell] for cell in results} == {
        cell: result.refused or "yes" for cell, result in results.items()
    }


def test_some_cells_are_pairs_of_everything() -> None:
    some = matrix.some("single")
    for one, other in ((0, 1), (0, 3), (1, 3)):
        pairs = {(cell[one], cell[other]) for cell in matrix.cells("single")}
        assert {(cell[one], cell[other]) for cell in some} == pairs


@pytest.mark.slow
def test_the_docs_have_the_table_of_all_cells(tmp_path: Path, page: str) -> None:
    matrix.save_language(tmp_path)
    results = {cell: matrix.run(cell, tmp_path) for cell in matrix.cells("single")}
    found = worlds.run(work.every_cell, tmp_path)
    assert found[0] == found[1]
    results |= found[0]
    check_cells(results)
    check_strategies(results)
    assert page == matrix.table(results).strip()

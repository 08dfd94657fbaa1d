"""The support matrix of the docs is what these runs found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from . import matrix

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(two: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[matrix.Cell, Any]:
    folder = tmp_path_factory.mktemp("single")
    matrix.save_language(folder)
    alone = {cell: matrix.run(cell, folder) for cell in matrix.cells("single")}
    return {**alone, **two[0]["cells"]}


def test_each_cell_trains_or_says_why_not(results: dict[matrix.Cell, matrix.Result]) -> None:
    for cell, result in results.items():
        assert matrix.works(result) or result.refused, (cell, result)
        mixed = cell[3] != "bf16-true"  # whose steps are often too small to change a weight
        if result.losses and mixed and cell[0] != "detection":
            assert result.moved[0] == result.trained, (cell, result)


def test_ranks_agree_bit_for_bit(two: Any) -> None:
    for cell, result in two[0]["cells"].items():
        assert result == two[1]["cells"][cell], cell


def test_strategies_agree(results: dict[matrix.Cell, matrix.Result]) -> None:
    for (task, tuning, strategy, precision), result in results.items():
        ddp = results[task, tuning, "ddp", precision]
        close = {"32-true": 1e-5, "bf16-mixed": 1e-2, "bf16-true": 3e-2}[precision]
        if strategy == "fsdp2" and result.losses:
            assert result.losses == pytest.approx(ddp.losses, rel=close), (task, tuning, precision)


def test_the_docs_have_this_table(results: dict[matrix.Cell, matrix.Result]) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert matrix.in_docs(page) == matrix.table(results).strip()

"""Bars of transformers are drawn on screens alone."""

import sys

import pytest
from transformers.utils import logging

from litflora.language.quiet import bars_on_screens_only


@pytest.mark.parametrize("screen", [True, False])
def test_bars_are_drawn_where_somebody_looks(monkeypatch, screen):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: screen)
    assert logging.is_progress_bar_enabled()
    with bars_on_screens_only():
        assert logging.is_progress_bar_enabled() == screen
    assert logging.is_progress_bar_enabled()

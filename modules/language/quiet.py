"""Progress bars of transformers, where there is a screen for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bars_on_screens_only() -> Iterator[None]:
    """Inside, transformers draws no bars into a log, where they would drown what is told."""
    from transformers.utils import logging

    quiet = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if quiet:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet:
            logging.enable_progress_bar()

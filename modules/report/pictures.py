"""Pictures that runs leave, inside the page."""

from __future__ import annotations

import base64
import io
import textwrap
from html import escape
from pathlib import Path

from PIL import Image

from .logged import UNREADABLE
from .points import Point

WIDEST = 900  # pixels
MOST_FIGURES = 600  # characters
# What is shown of a run if it is there: where, and what it is. The last of several is taken.
KINDS = (
    ("gallery/epoch_*.png", "validation samples and what the model makes of them"),
    ("test/confusion_matrix.png", "confusion matrix of the test"),
    ("spectra*.png", "singular values of what the tuning changed"),
)


def pictures(point: Point) -> str:
    """The pictures of a point's first seed; nothing if it has left none."""
    if not point.folders:
        return ""
    folder = point.folders[0]
    found = [(sorted(folder.glob(pattern)), what) for pattern, what in KINDS]
    figures = [_figure(paths[-1], f"{point.label}: {what}") for paths, what in found if paths]
    return "".join(figures)


def _figure(path: Path, said: str) -> str:
    """A picture and what it shows; nothing of one that cannot be read."""
    try:
        source = inlined(path)
    except (*UNREADABLE, SyntaxError):  # which is what Pillow says of a broken PNG
        return ""
    told = escape(said)
    alt = escape(said + _data(path.with_suffix(".csv")))
    image = f'<img src="{source}" alt="{alt}" loading="lazy">'
    return f"<figure>{image}<figcaption>{told}</figcaption></figure>"


def _data(path: Path) -> str:
    """The beginning of the table beside a picture, for those who do not see it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UNREADABLE:
        return ""
    return f". Its figures: {textwrap.shorten('; '.join(lines), MOST_FIGURES, placeholder=' ...')}"


def inlined(path: Path) -> str:
    """A picture as a data URI, made smaller if it is large."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((WIDEST, WIDEST))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

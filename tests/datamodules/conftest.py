from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Photo = Callable[..., Path]


@pytest.fixture
def photo() -> Photo:
    """Writes a small image whose red channel is given and whose rest is noise."""
    rng = np.random.default_rng(0)

    def write(path: Path, red: int = 128, size: tuple[int, int] = (24, 20)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        pixels[..., 0] = red
        Image.fromarray(pixels).save(path)
        return path

    return write


@pytest.fixture
def photos(tmp_path: Path, photo: Photo) -> Path:
    """One folder per class: 12 cats, 8 dogs, 6 eels; an image's red channel is its number."""
    root = tmp_path / "photos"
    for name, count in {"cat": 12, "dog": 8, "eel": 6}.items():
        for number in range(count):
            photo(root / name / f"{number:02d}.png", red=10 * number)
    return root

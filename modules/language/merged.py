"""A folder with the weights of tower, connector and language model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import nn

from .quiet import bars_on_screens_only

TOWER, CONNECTOR = "tower.safetensors", "connector.safetensors"
LANGUAGE_MODEL = "language_model"
NAMED = ("pretrained", "embedded")  # weights that are no path


@dataclass(frozen=True)
class MergedFolder:
    """What `litflora merge` writes of a network that was put together here.

    ``tower.safetensors`` has timm's keys, up to the layer whose features are taken;
    ``language_model`` is as transformers has it, with its tokenizer.

    Attributes:
        path: The folder.
    """

    path: Path

    @classmethod
    def of(cls, weights: str | None) -> MergedFolder | None:
        """The folder that weights name; None if they name none.

        Raises:
            FileNotFoundError: They name a folder that lacks a part, or nothing that is there.
        """
        path = Path(weights or "").expanduser()
        if not weights or weights in NAMED or path.is_file():
            return None
        if not path.is_dir():
            raise FileNotFoundError(
                f"weights {path} are neither a folder that `litflora merge` has written nor a "
                "file: give one of these, 'pretrained', or null"
            )
        lacking = [n for n in (TOWER, CONNECTOR, LANGUAGE_MODEL) if not (path / n).exists()]
        if lacking:
            raise FileNotFoundError(
                f"weights folder {path} lacks {', '.join(lacking)}: give one that `litflora merge` "
                "has written, or a file of the tower's weights"
            )
        return cls(path)

    @property
    def language_model(self) -> str:
        """The folder of the language model."""
        return str(self.path / LANGUAGE_MODEL)

    def load(self, net: Any) -> None:
        """Loads the weights of tower and connector.

        Args:
            net: A `VisionLanguageNet`, whose language model is the folder's already.

        Raises:
            ValueError: They are of another one.
        """
        for name, part in _files(net).items():
            state = load_file(self.path / name)
            own = {key: value.shape for key, value in part.state_dict().items()}
            if {key: value.shape for key, value in state.items()} != own:
                raise ValueError(
                    f"{self.path / name} is of another one: give tower, layer, img_size and "
                    "connector as they were when it was merged"
                )
            part.load_state_dict(state)

    def write(self, net: Any, tokenizer: Any) -> None:
        """Writes the parts of a `VisionLanguageNet`, adapters merged into it."""
        self.path.mkdir()
        for name, part in _files(net).items():
            state = {key: value.contiguous() for key, value in part.state_dict().items()}
            (self.path / name).write_bytes(save(state))
        with bars_on_screens_only():
            net.language_model.save_pretrained(self.path / LANGUAGE_MODEL)
        tokenizer.save_pretrained(self.path / LANGUAGE_MODEL)


def _files(net: Any) -> dict[str, nn.Module]:
    return {TOWER: net.tower, CONNECTOR: net.connector}

"""Local weight files: what is in them, and what to say when they do not load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import PretrainedCfg, load_state_dict
from torch import nn

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

# Where image towers saved by OpenCLIP and OpenAI keep their classes: key, dimension.
CLIP_HEADS = {"visual.head.proj.weight": 0, "visual.proj": 1}


def classes_in_file(path: Path, config: PretrainedCfg) -> int | None:
    """The number of classes of the classifier saved in a file; None if none is seen.

    Args:
        path: The file.
        config: timm's description of the model, which names its classifier.
    """
    _check_exists(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"weights file {path} must end in one of {', '.join(SUFFIXES)}")
    try:
        shapes = _shapes(path)
    except Exception as error:  # a file that is no state dict can fail in any way
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"weights file {path} cannot be read: {reason}\n"
            "It is damaged or no plain state dict: fetch it again, or save it as .safetensors"
        ) from error
    classifier = config.classifier or ()
    names = (classifier,) if isinstance(classifier, str) else classifier
    heads = {**{f"{name}.weight": 0 for name in (*names, "head")}, **CLIP_HEADS}
    return next((shapes[key][dim] for key, dim in heads.items() if key in shapes), None)


def _shapes(path: Path) -> dict[str, Any]:
    """The shapes of a file's tensors; of a safetensors file no values are read."""
    if path.suffix != ".safetensors":
        return {key: value.shape for key, value in load_state_dict(str(path)).items()}
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        return {key.removeprefix("module."): file.get_slice(key).get_shape() for key in keys}


def holds_whole_net(weights: str | None) -> bool:
    """Whether weights are a file of a net for dense prediction, as `litflora merge` writes it.

    Args:
        weights: A path or whatever else stands for weights, see `litflora.backbones.create`.

    Raises:
        FileNotFoundError: If there is no file at that path.
    """
    path = Path(weights or "").expanduser()
    if path.suffix != ".safetensors":
        return False
    _check_exists(path)
    try:
        with safe_open(path, "pt") as file:
            return any("pyramid." in key for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False  # `classes_in_file` says what is wrong with it


def load_whole_net(net: nn.Module, weights: str) -> None:
    """Loads a file of which `holds_whole_net` is true, strictly.

    Raises:
        ValueError: The file is of another net; names the first key that differs.
    """
    state, own = load_file(Path(weights).expanduser()), net.state_dict()
    reshaped = [k for k in own if k in state and state[k].shape != own[k].shape]
    differences = [
        _counted("lacks", [key for key in own if key not in state]),
        _counted("has no place for", [key for key in state if key not in own]),
        _counted(
            "differs at", [f"{k} ({[*state[k].shape]}, not {[*own[k].shape]})" for k in reshaped]
        ),
    ]
    if found := "; ".join(filter(None, differences)):
        raise ValueError(
            f"weights file {weights} does not fit this net: it {found}.\n"
            "Give backbone, head, head_width, img_size and classes as they were when it was merged"
        )
    net.load_state_dict(state)


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"weights file {path} does not exist: give the path of a {', '.join(SUFFIXES)} file, "
            "'pretrained', or null"
        )


def fit_error(path: Path, name: str, error: Exception) -> ValueError:
    """Says in two lines in what a file and a model differ, from torch's long list."""
    text = str(error)
    shapes = re.findall(
        r"size mismatch for (\S+): .*? shape torch.Size\((.*?)\) .* is torch.Size\((.*?)\)", text
    )
    differences = [
        _counted("lacks", _keys("Missing", text)),
        _counted("has no place for", _keys("Unexpected", text)),
        _counted("differs at", [f"{key} ({a}, not {b})" for key, a, b in shapes]),
    ]
    found = "; ".join(filter(None, differences)) or f"its layout is another one's ({text[:200]})"
    return ValueError(
        f"weights file {path} does not fit backbone {name}: {found}.\n"
        "Name the backbone that the file was made for"
    )


def _keys(kind: str, text: str) -> list[str]:
    line = re.search(rf"{kind} key\(s\) in state_dict: (.*)", text)
    return re.findall(r'"(.+?)"', line[1]) if line else []


def _counted(verb: str, keys: list[str]) -> str:
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{verb} {keys[0]}{more}" if keys else ""

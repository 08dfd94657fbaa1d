"""Build a timm model for a number of classes, an input size, and weights from anywhere."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, split_model_name_tag
from torch import nn

from ..heads import classifier_names
from . import embedded  # registers convnext_shapes with timm
from .deferred import create_model, give_memory
from .files import classes_in_file, fit_error

# Models that timm knows by a config on the hub or in a folder, not by a name of its own.
OUTSIDE = ("hf-hub:", "hf_hub:", "local-dir:")


def create(
    name: str,
    weights: str | None = "pretrained",
    num_classes: int = 1000,
    img_size: int | None = None,
    drop_path: float = 0.0,
) -> nn.Module:
    """Builds a classification backbone.

    Args:
        name: A timm model name, with or without a pretrained tag, or ``convnext_shapes``;
            ``hf-hub:user/model`` and ``local-dir:folder`` as timm takes them.
        weights: ``"pretrained"`` fetches timm's weights from the hub; a path reads a local
            .safetensors, .pth or .bin file; ``"embedded"`` is the file inside this package, for
            ``convnext_shapes``; None starts at random.
        num_classes: Outputs of the classifier. It keeps the weights' own classifier if that has
            as many, otherwise it starts afresh.
        img_size: Side of the input images in pixels; None is the model's own. Position
            embeddings are resampled to it.
        drop_path: Probability that the last block is left out for a sample in training; that of
            earlier blocks falls linearly to 0 (stochastic depth, Huang et al., arXiv:1603.09382).

    Raises:
        FileNotFoundError: If the weights file does not exist.
        ValueError: If the name, the size, the weights or the probability cannot be used.
    """
    check_name(name)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    return build(name, weights, num_classes, img_size, drop_path)


def build(
    name: str,
    weights: str | None,
    num_classes: int,
    img_size: int | tuple[int, int] | None,
    drop_path: float = 0.0,
) -> nn.Module:
    """Builds what `create` does, also without a classifier or for images of height and width."""
    options = {**_size_options(name, img_size), **_depth_options(name, drop_path)}
    net = _load(name, weights, num_classes, options)
    _call_qkv(net)
    return net


def _load(name: str, weights: str | None, num_classes: int, options: dict[str, Any]) -> nn.Module:
    if weights is None:
        return timm.create_model(name, num_classes=num_classes, **options)
    if weights == "pretrained":
        return _from_hub(name, num_classes, options)
    if weights == "embedded":
        if name != "convnext_shapes":
            raise ValueError(
                f"weights 'embedded' belong to convnext_shapes: give {name} 'pretrained', "
                "a local file, or null"
            )
        return _from_file(name, embedded.WEIGHTS, num_classes, options)
    return _from_file(name, Path(weights).expanduser(), num_classes, options)


def normalization(net: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and standard deviations of the images that the weights were trained on."""
    config = net.pretrained_cfg
    return tuple(config["mean"]), tuple(config["std"])


def check_name(name: str) -> None:
    """Raises unless timm knows a model of this name, and its tag."""
    if name.startswith(OUTSIDE):
        return
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(
            f"no timm model is called {architecture!r}"
            + (f": did you mean {_listed(near)}?" if near else ": see timm.list_models()")
        )
    tags = get_arch_pretrained_cfgs(architecture)
    if tag and name not in tags:
        known = [split_model_name_tag(known)[1] for known in tags]
        near = difflib.get_close_matches(tag, known, n=3, cutoff=0.0)
        raise ValueError(f"{architecture} has no pretrained tag {tag!r}: it has {_listed(near)}")


def _size_options(name: str, img_size: int | tuple[int, int] | None) -> dict[str, Any]:
    """What makes the model take images of this size, after checking that it can."""
    net = without_weights(name)
    options: dict[str, Any] = {}
    if _takes(net, "dynamic_img_size"):
        options["dynamic_img_size"] = True  # then any multiple of the patch works at inference
    if img_size is None:
        return options
    sides = (img_size,) if isinstance(img_size, int) else img_size
    if not _takes(net, "img_size"):
        smallest = net.feature_info[-1]["reduction"]
        if min(sides) < smallest:
            raise ValueError(f"img_size {img_size} is too small for {name}: at least {smallest}")
        return options
    embedding = getattr(net, "patch_embed", None)
    if not hasattr(embedding, "patch_size"):
        raise ValueError(f"{name} takes images of its own size only: leave img_size out")
    patch = embedding.patch_size[0]
    for side in sides:
        if side < patch or side % patch:
            below = max(side // patch, 1) * patch
            raise ValueError(
                f"img_size {side} is not a multiple of the patch size {patch} of {name}: "
                f"use {below} or {below + patch}"
            )
    return {**options, "img_size": img_size}


def _depth_options(name: str, drop_path: float) -> dict[str, Any]:
    """What gives the model stochastic depth, after checking that it can have it."""
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path must lie in [0, 1), not {drop_path}")
    if not drop_path:
        return {}
    if not _takes(without_weights(name), "drop_path_rate"):
        raise ValueError(f"{name} has no stochastic depth: leave drop_path at 0")
    return {"drop_path_rate": drop_path}


def without_weights(name: str) -> nn.Module:
    """The model on the meta device, where it takes neither memory nor time to fill."""
    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except (OSError, ValueError) as error:
        if not name.startswith(OUTSIDE):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"backbone {name} could not be read: {reason}") from error


def _takes(net: nn.Module, argument: str) -> bool:
    return any(
        argument in inspect.signature(cls.__init__).parameters for cls in type(net).__mro__[:-1]
    )


def _from_hub(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    try:
        return create_model(name, num_classes=num_classes, **options)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the pretrained weights of {name} could not be fetched: {reason}\n"
            "Give weights a local .safetensors or .pth file instead, or null for a random start"
        ) from error


def _from_file(name: str, path: Path, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """Loads strictly with the file's own number of classes, then changes the classifier."""
    config = get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    found = classes_in_file(path, config)
    error: Exception | None = None
    # Foreign layouts hide their head until timm has translated them: then it has none, or timm's.
    for classes in (0, config.num_classes) if found is None else (found,):
        overlay = {"file": str(path), "num_classes": classes}
        try:
            net = create_model(name, pretrained_cfg_overlay=overlay, num_classes=classes, **options)
        except (RuntimeError, KeyError, AttributeError, ValueError) as reason:
            error = error or reason
            continue
        if classes != num_classes:
            _new_classifier(net, num_classes)
        return net
    assert error is not None
    raise fit_error(path, name, error) from error


def _new_classifier(net: nn.Module, num_classes: int) -> None:
    net.reset_classifier(num_classes)
    for head in classifier_names(net) if num_classes else ():
        layer = net.get_submodule(head)
        give_memory(layer)
        if isinstance(layer, nn.Linear):  # as timm starts the heads of its ConvNeXts and ViTs
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


def _call_qkv(net: nn.Module) -> None:
    """Has the attentions of EVA and BEiT call their qkv layer.

    With separate q and v biases they read its weight past it, and an adapter on it would be
    without effect. The flag changes where the bias is added, not the result.
    """
    for module in net.modules():
        if getattr(module, "q_bias", None) is not None and hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True


def _listed(names: list[str]) -> str:
    return " or ".join(repr(name) for name in names)

"""Feature maps of a timm backbone at several strides, for dense prediction."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .create import build, check_name, without_weights

# Strides of the simple feature pyramid. Stages finer than the first are left out, too: the dense
# heads of the literature begin there, and so every backbone gives much the same maps.
STRIDES = (4, 8, 16, 32)


def create_pyramid(
    name: str,
    weights: str | None = "pretrained",
    img_size: int | tuple[int, int] | None = None,
    blocks: Sequence[int] | None = None,
    width: int = 256,
    finest: int = STRIDES[0],
    drop_path: float = 0.0,
) -> Pyramid:
    """Builds a backbone without classifier that gives feature maps.

    Args:
        name: A timm model name, see `create`.
        weights: ``"pretrained"``, a path, ``"embedded"`` or None, see `create`.
        img_size: Side of the training images in pixels, or their height and width; None is the
            model's own. It is rounded up to what the images are padded to, and position embeddings
            are resampled to that once, here. Images of another size have them resampled at every
            call, by the models that can.
        blocks: Blocks of a plain ViT whose maps are wanted, see `Pyramid`.
        width: Channels of a plain ViT's simple feature pyramid, see `Pyramid`.
        finest: Stride of the finest map, see `Pyramid`.
        drop_path: Stochastic depth of the backbone, see `create`.

    Raises:
        FileNotFoundError: If the weights file does not exist.
        ValueError: If the name, the size, the weights, the blocks or the probability cannot be
            used.
    """
    check_name(name)
    # Refuses before weights are fetched.
    sketch = Pyramid(without_weights(name), blocks, width, finest)
    if img_size is not None:
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        if len(sides) != 2:
            raise ValueError(f"img_size must be a side, or height and width, not {img_size}")
        height, breadth = (side + -side % sketch.divisor for side in sides)
        img_size = (height, breadth)
    net = build(name, weights, 0, img_size, drop_path)
    return Pyramid(net, blocks, width, finest)


class Wrapper(nn.Module):
    """A module around a timm model that answers timm's questions about it, by its own names.

    With ``get_classifier``, that is all that a tuning, its targets, the normalisation of images and
    layer-wise learning rates ask of a network. A wrapper can hold another one.

    Attributes:
        inner: Dotted name of the module inside that is asked.
    """

    inner: ClassVar[str]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm knows of the weights, such as means and deviations of their images."""
        return self.get_submodule(self.inner).pretrained_cfg

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the backbone's layers, stem first; all other names count as the head."""
        groups = self.get_submodule(self.inner).group_matcher(coarse=coarse)
        return {group: self._reroot(patterns) for group, patterns in groups.items()}

    def no_weight_decay(self) -> set[str]:
        """Names of the backbone's parameters that weight decay leaves alone."""
        inner = self.get_submodule(self.inner)
        names = inner.no_weight_decay() if hasattr(inner, "no_weight_decay") else ()
        return {f"{self.inner}.{name}" for name in names}

    def _reroot(self, patterns: Any) -> Any:
        if isinstance(patterns, (list, tuple)):
            return [(self._reroot(pattern), order) for pattern, order in patterns]
        if patterns is None:
            return None
        unanchored = re.sub(r"(?<![\[\\])\^", "", patterns)  # timm matches from the start anyway
        return rf"^{re.escape(self.inner)}\.(?:{unanchored})"


class Pyramid(Wrapper):
    """Feature maps of a timm backbone, finest first.

    The stages of a hierarchical backbone are its maps, from stride 4 on. A plain ViT has one stride
    only, and two ways to give several maps: a simple feature pyramid on its last block (Li et al.,
    "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022,
    arXiv:2203.16527), or the maps of several blocks as they are, as DPT takes them.

    Maps of ViT blocks go through the backbone's final norm: between blocks, channels differ in
    scale by orders of magnitude, and the norm brings them to what the weights' own head was fed.

    Images are padded here, since only the pyramid knows to what: maps cover the padded image.

    Attributes:
        backbone: The timm model; its classifier, and what no map needs, is removed.
        neck: The simple feature pyramid, trained from the start; else an identity.
        channels: Channels of the maps.
        strides: Pixels between neighbours in the maps.
    """

    inner: ClassVar[str] = "backbone"

    def __init__(
        self,
        backbone: nn.Module,
        blocks: Sequence[int] | None = None,
        width: int = 256,
        finest: int = STRIDES[0],
    ) -> None:
        """Takes over a timm model.

        Args:
            backbone: The model. It is changed.
            blocks: Indices of blocks of a plain ViT, in rising order, whose maps are wanted; None
                is the simple feature pyramid of strides 4, 8, 16 and 32, which needs patches of
                such a size.
            width: Channels of the simple feature pyramid.
            finest: Stride of the finest map of stages or simple feature pyramid.
        """
        super().__init__()
        strides = _strides(backbone)
        plain = len(set(strides)) == 1
        self._taken = _blocks(backbone, blocks) if plain else _stages(backbone, blocks, finest)
        self._norm = plain and hasattr(backbone, "norm")  # what SAM has is a neck of its own
        backbone.prune_intermediate_layers(self._taken, prune_norm=not self._norm)
        self.backbone = backbone
        self.neck: nn.Module = nn.Identity()
        self.channels = tuple(backbone.feature_info[i]["num_chs"] for i in self._taken)
        self.strides = tuple(strides[i] for i in self._taken)
        if plain and blocks is None:
            stride, self.strides = self.strides[0], STRIDES[STRIDES.index(finest) :]
            self.neck = SimpleFeaturePyramid(self.channels[0], stride, width, self.strides)
            self.channels = (width,) * len(self.strides)

    @property
    def divisor(self) -> int:
        """Images are padded to a multiple of this many pixels."""
        return self.strides[-1]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of normalised images of any size.

        Args:
            images: Normalised floats [N, 3, H, W]. Zeros, which are the mean colour, are added at
                the right and below up to multiples of ``divisor``.

        Returns:
            Maps [N, channels[i], H' / strides[i], W' / strides[i]] of the padded H' x W' images.
        """
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.divisor, 0, -height % self.divisor))
        maps = self.backbone.forward_intermediates(
            images, self._taken, norm=self._norm, output_fmt="NCHW", intermediates_only=True
        )
        return self.neck(maps)

    def features(self, images: Tensor) -> list[Tensor]:
        """The same as a call of the pyramid."""
        return self(images)

    def get_classifier(self) -> nn.Module:
        """What is trained whole, and not adapted: the neck."""
        return self.neck


class SimpleFeaturePyramid(nn.Module):
    """Maps at several strides from the one map of a plain ViT.

    Each comes straight from that map, by transposed convolutions or pooling; there is no path from
    coarse to fine. Section 3 of the paper, with its normalisation.
    """

    def __init__(
        self, channels: int, stride: int, width: int, strides: Sequence[int] = STRIDES
    ) -> None:
        """Makes the levels.

        Args:
            channels: Channels of the ViT's map.
            stride: Stride of the ViT's map, times a power of two one of ``strides``.
            width: Channels of the new maps.
            strides: Strides of the new maps.
        """
        super().__init__()
        self.levels = nn.ModuleList(_level(channels, stride, target, width) for target in strides)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps, in the order of their strides, from a list of one."""
        (last,) = maps
        return [level(last) for level in self.levels]


def _level(channels: int, stride: int, target: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    while stride > target:
        if layers:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, 2))
        channels, stride = channels // 2, stride // 2
    if stride < target:
        layers.append(nn.MaxPool2d(target // stride))
    return nn.Sequential(
        *layers,
        nn.Conv2d(channels, width, 1, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width),
    )


def _strides(backbone: nn.Module) -> list[int]:
    """Strides of all maps that the backbone could give; raises if they make no pyramid."""
    asked = ("feature_info", "forward_intermediates", "prune_intermediate_layers")
    if not all(getattr(backbone, name, None) for name in asked):
        raise ValueError(f"{_name(backbone)} gives no feature maps: take a ConvNeXt or a ViT")
    strides = [info["reduction"] for info in backbone.feature_info]
    if len(set(strides)) not in (1, len(strides)) or strides != sorted(strides):
        raise ValueError(f"{_name(backbone)} is no pyramid: its maps have strides {strides}")
    return strides


def _stages(backbone: nn.Module, blocks: Sequence[int] | None, finest: int) -> list[int]:
    if blocks is not None:
        raise ValueError(f"blocks are those of a plain ViT: {_name(backbone)} has stages, use null")
    strides = _strides(backbone)
    return [i for i, stride in enumerate(strides) if stride >= finest]


def _blocks(backbone: nn.Module, blocks: Sequence[int] | None) -> list[int]:
    depth, stride = len(backbone.feature_info), backbone.feature_info[0]["reduction"]
    if blocks is None and stride not in STRIDES:
        raise ValueError(
            f"{_name(backbone)} has patches of {stride} px, and a simple feature pyramid halves "
            f"and doubles them to strides {STRIDES}: take one with patches of 8, 16 or 32 px or, "
            "for segmentation, name blocks, whose maps are used as they are"
        )
    taken = [depth - 1] if blocks is None else list(blocks)
    if not taken or taken != sorted(set(taken)) or taken[0] < 0 or taken[-1] >= depth:
        raise ValueError(
            f"blocks must be in rising order and from 0 to {depth - 1} in {_name(backbone)}, "
            f"not {taken}"
        )
    return taken


def _name(backbone: nn.Module) -> str:
    return backbone.pretrained_cfg["architecture"]

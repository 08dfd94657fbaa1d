"""A network of a vision tower, a connector and a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, layer_norm

from ..adapters.sharded import is_sharded
from ..backbones.pyramid import Wrapper
from .connectors import Connector
from .layers import block_lists, inside, language_groups
from .output import Output, token_loss


class VisionLanguageNet(Wrapper):
    """The features of images take the places of image tokens in a language model's input.

    Attributes:
        tower: A timm model without classifier.
        connector: See `Connector`.
        language_model: A causal language model of transformers.
        layers: Indices of the tower's blocks or stages whose features are taken.
        image_token: Id of the token whose place features take.
    """

    inner: ClassVar[str] = "tower"

    def __init__(
        self,
        tower: nn.Module,
        connector: Connector,
        language_model: nn.Module,
        image_token: int,
        layer: int | Sequence[int] = -1,
    ) -> None:
        """Puts the parts together.

        Raises:
            ValueError: The tower has no such layer, or the parts do not fit each other.
        """
        super().__init__()
        _check_widths(channels_of(tower, layer), connector, language_model)
        self.layers = _indices(tower, layer)
        # What comes after would have no gradient, and processes would wait for it.
        self._norm = any(True for _ in getattr(tower, "norm", nn.Identity()).parameters())
        tower.prune_intermediate_layers(self.layers, prune_norm=not self._norm)
        self.tower = tower
        self.connector = connector
        self.language_model = language_model
        self.image_token = image_token

    def get_classifier(self) -> nn.Module:
        """The connector, which trains from the start: what timm's models have their head for."""
        return self.connector

    def parts(self) -> dict[str, list[str]]:
        """Names of the modules of each part."""
        return {name: [name] for name in ("tower", "connector", "language_model")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the layers of tower, connector and language model, in this order."""
        lists = [f"language_model.{name}" for name in block_lists(self.language_model)]
        return {
            **super().group_matcher(coarse=coarse),
            "connector": inside(["tower", "connector"]),  # and what follows the tower's blocks
            **language_groups(self, "language_model", lists, coarse),
        }

    def features(self, images: Tensor) -> Tensor:
        """Features ``[n, channels, h, w]`` of normalised images, without prefix tokens.

        Those of several layers follow each other in channels, at the size of the coarsest. A ViT's
        go through its last norm; those of stages are normed over channels, for stages differ in
        scale.
        """
        found = self.tower.forward_intermediates(
            images, self.layers, norm=self._norm, output_fmt="NCHW", intermediates_only=True
        )
        if not self._norm:
            found = [_normed(each) for each in found]
        size = found[-1].shape[-2:]
        return torch.cat([adaptive_avg_pool2d(each, size) for each in found], 1)

    def embed(self, input_ids: Tensor, images: Tensor | None) -> Tensor:
        """Embeddings ``[batch, length, width]`` of tokens, those of images from their features.

        Args:
            input_ids: ``[batch, length]``.
            images: Normalised, ``[n, 3, h, w]``, in the order of their tokens; None is none.

        Raises:
            ValueError: There are other numbers of image tokens and of features.
        """
        places = input_ids == self.image_token
        # Some models have no embedding of that token: it was added to the tokenizer alone.
        embedded = self.language_model.get_input_embeddings()(input_ids.masked_fill(places, 0))
        found = self._embedded(images, embedded)
        count = int(places.sum())
        if count != len(found):
            raise ValueError(f"{count} image tokens, and features for {len(found)}")
        return embedded.masked_scatter(places[..., None], found)

    def _embedded(self, images: Tensor | None, like: Tensor) -> Tensor:
        """Embeddings ``[tokens, width]`` of all images."""
        none = images is None or not len(images)
        if none and not (self.training or is_sharded(self)):
            return like.new_zeros(0, like.shape[-1])
        if none:  # processes wait for each other's gradients, and for weights that are shared out
            images = like.new_zeros(1, *self.pretrained_cfg["input_size"])
        found = self.connector(self.features(images)).flatten(0, 1).to(like.dtype)
        return found[:0] if none else found

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        prompt: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> Output:
        """The logits of every next token, the loss if there are labels, and an answer to a prompt.

        One call does all that an evaluation wants of a batch: processes that hold parts of the
        network call it equally often.

        Args:
            input_ids: ``[batch, length]``; None is a prompt alone.
            attention_mask: 1 where there are tokens, ``[batch, length]``; or which tokens see
                which, ``[batch, 1, length, length]``, bool.
            images: Normalised, ``[n, 3, h, w]``.
            labels: ``[batch, length]``, -100 where nothing is to be learnt.
            position_ids: ``[batch, length]``.
            prompt: What `generate` takes.
            options: Of `generate`.

        Raises:
            ValueError: The language model attends in a way that such a mask means nothing to.
        """
        if attention_mask is not None and attention_mask.ndim == 4:
            check_masks(self.language_model)
        loss = logits = tokens = None
        if input_ids is not None:
            logits = self.language_model(
                inputs_embeds=self.embed(input_ids, images),
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            ).logits
        if logits is not None and labels is not None:
            loss = token_loss(logits, labels)
        if prompt is not None:
            tokens = self.generate(**prompt, **options)
        return Output(loss, logits, tokens)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """New tokens ``[batch, length]``, as transformers' ``generate`` gives them.

        Args:
            input_ids: Padded on the left, ``[batch, length]``.
            attention_mask: ``[batch, length]``.
            images: Normalised, ``[n, 3, h, w]``.
            options: Of ``generate``, such as ``max_new_tokens``.
        """
        embedded = self.embed(input_ids, images)
        # Processes that hold parts of the network make as many steps as the one that makes most.
        return self.language_model.generate(
            inputs_embeds=embedded,
            attention_mask=attention_mask,
            synced_gpus=is_sharded(self),
            **options,
        )


def _normed(features: Tensor) -> Tensor:
    """Features ``[n, channels, h, w]`` of mean 0 and deviation 1 over channels."""
    return layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)


def channels_of(tower: nn.Module, layer: int | Sequence[int]) -> int:
    """Channels of the features of a tower's blocks or stages.

    Raises:
        ValueError: It has none of that index.
    """
    return sum(tower.feature_info[index]["num_chs"] for index in _indices(tower, layer))


def _indices(tower: nn.Module, layer: int | Sequence[int]) -> list[int]:
    depth = len(tower.feature_info)
    asked = [layer] if isinstance(layer, int) else list(layer)
    for index in asked or [depth]:
        if not -depth <= index < depth:
            raise ValueError(
                f"layer {layer} of a tower with {depth}: give -{depth} to {depth - 1}, or several"
            )
    return sorted({index % depth for index in asked})


def check_masks(language_model: nn.Module) -> None:
    """Raises unless a mask of tokens that see each other is heeded; others add it to the scores."""
    attends = language_model.config._attn_implementation
    if attends != "sdpa":
        raise ValueError(
            f"packed rows need attention 'sdpa', and {type(language_model).__name__} has "
            f"{attends!r}: set pack: false"
        )


def _check_widths(channels: int, connector: Connector, language_model: nn.Module) -> None:
    linear = [module for module in connector if isinstance(module, nn.Linear)]
    taken, given = linear[0].in_features, linear[-1].out_features
    width = language_model.get_input_embeddings().embedding_dim
    if taken != channels * connector.shuffle**2:
        raise ValueError(
            f"the connector takes {taken} channels, and the tower gives {channels}"
            + f" x {connector.shuffle**2}" * (connector.shuffle > 1)
        )
    if given != width:
        raise ValueError(
            f"the connector gives {given} channels, and the language model takes {width}"
        )

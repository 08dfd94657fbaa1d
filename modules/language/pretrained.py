"""Checkpoints of transformers that take images and text: the network, its parts, its processor."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..adapters.sharded import is_sharded
from ..adapters.targets import is_inside
from ..backbones.deferred import deferred
from .deferred import without_weights
from .layers import block_lists, inside, language_groups, numbered
from .output import Output, token_loss
from .quiet import bars_on_screens_only

# What a tower tells of itself: a gradient of it would pass blocks that no image's does.
UNTAKEN = {"last_hidden_state", "hidden_states", "attentions"}


class PretrainedNet(nn.Module):
    """A model of transformers that takes images and text, as litflora's modules ask for it.

    Its own names stand behind ``model.``: an adapter of ``net.model`` alone is one of the plain
    model, with names that PEFT knows.

    Attributes:
        model: The model.
        takes: Names of its inputs, but for labels.
    """

    # The processor has normalised the images, and takes those of any size.
    pretrained_cfg: ClassVar[dict[str, Any]] = {
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "input_size": (3, 336, 336),
    }

    def __init__(self, model: nn.Module) -> None:
        """Takes over a model.

        Raises:
            ValueError: It has no vision tower, connector or language model, or no blocks.
        """
        super().__init__()
        self.model = model
        self.takes = frozenset(inspect.signature(model.forward).parameters) - {"labels"}
        self.parts()
        self.group_matcher()

    def parts(self) -> dict[str, list[str]]:
        """Names of the modules of each part, of the one with the blocks first.

        A connector inside the tower, as Qwen-VL's merger, is no part of it: the tower is then the
        other modules that it is made of. The output layer is of the language model.
        """
        model = self.model
        tower, decoder = model.get_encoder(modality="image"), model.get_decoder()
        if model in (tower, decoder) or model.base_model in (tower, decoder):
            raise ValueError(
                f"{type(model).__name__} has no vision tower or no language model by a name that "
                "transformers knows"
            )
        names = {module: name for name, module in self.named_modules()}
        parent = self.get_submodule(names[tower].rpartition(".")[0])
        outside = [m for m in parent.children() if m not in (tower, decoder) and _weighs(m)]
        inside = [] if outside else _mergers(tower, decoder.get_input_embeddings().embedding_dim)
        if not outside and not inside:
            raise ValueError(f"{type(model).__name__} has no connector beside or in its tower")
        rest = [m for m in tower.children() if m not in inside and _weighs(m)]
        head = model.get_output_embeddings()
        heads = [] if head is None or is_inside(names[head], [names[decoder]]) else [head]
        found = {
            "tower": rest if inside else [tower],
            "connector": outside or inside,
            "language_model": [decoder, *heads],
        }
        return {part: self._blocks_first(names[m] for m in own) for part, own in found.items()}

    def _blocks_first(self, names: Iterator[str]) -> list[str]:
        return sorted(names, key=lambda name: not self.has_blocks(name))

    def has_blocks(self, name: str) -> bool:
        """Whether a module has blocks in it."""
        return any(is_inside(own, [name]) for own in self._lists())

    def _lists(self) -> list[str]:
        return [f"model.{name}" for name in block_lists(self.model)]

    def _around_blocks(self) -> tuple[list[str], str, list[str]]:
        """Modules of the tower's first before its list of blocks, that list, and those after."""
        tower = self.parts()["tower"][0]
        blocks = next(name for name in self._lists() if is_inside(name, [tower]))
        names = [name for name, _ in self.get_submodule(tower).named_modules(prefix=tower)]
        at = names.index(blocks)
        before = [name for name in names[:at] if not is_inside(blocks, [name])]
        return before, blocks, [name for name in names[at:] if not is_inside(name, [blocks])]

    def unread(self) -> list[str]:
        """Modules of the tower after the layer whose features are taken, as LLaVA's last block.

        They would have no gradient, and processes would wait for it.
        """
        taken = getattr(self.model.config, "vision_feature_layer", None)
        _, blocks, after = self._around_blocks()
        depth = len(self.get_submodule(blocks))
        layers = taken if isinstance(taken, list | tuple) else [-1 if taken is None else taken]
        last = max(layer if layer >= 0 else depth + 1 + layer for layer in layers)
        if last == depth:
            return []
        return [*(f"{blocks}.{index}" for index in range(last, depth)), *after]

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The connector: what timm's models have their head for."""
        return tuple(map(self.get_submodule, self.parts()["connector"]))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the layers of tower, connector and language model, in this order."""
        parts, lists = self.parts(), self._lists()
        decoder = parts["language_model"][0]
        own = [name for name in lists if is_inside(name, [decoder])]
        before, _, _ = self._around_blocks()
        return {
            "stem": inside([*before, *parts["tower"][1:]]),
            "blocks": numbered([name for name in lists if name not in own], coarse),
            "connector": inside([*parts["tower"], *parts["connector"]]),
            **language_groups(self, decoder, own, coarse),
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        prompt: dict[str, Any] | None = None,
        others: dict[str, Any] | None = None,
        **given: Any,
    ) -> Output:
        """The logits of every next token, the loss if there are labels, and an answer to a prompt.

        Args:
            input_ids: ``[batch, length]``; None is a prompt alone.
            labels: ``[batch, length]``, -100 where nothing is to be learnt.
            prompt: What `generate` takes.
            others: What else the model takes, as its processor makes it, and ``blank``: an image
                that the tower runs on where there is none and processes wait for each other.
            given: The same by name; and options of `generate`.
        """
        loss = logits = tokens = None
        given = {**(others or {}), **given}
        blank = given.pop("blank", None)
        inputs = {key: value for key, value in given.items() if key in self.takes}
        if input_ids is not None:
            with self._tower_runs(inputs, blank):
                logits = self.model(input_ids=input_ids, **inputs, use_cache=False).logits
        if logits is not None and labels is not None:
            loss = token_loss(logits, labels)
        if prompt is not None:
            options = {key: value for key, value in given.items() if key not in inputs}
            tokens = self.generate(**prompt, **options)
        return Output(loss, logits, tokens)

    @contextmanager
    def _tower_runs(
        self, inputs: dict[str, Any], blank: dict[str, Tensor] | None
    ) -> Iterator[None]:
        """Has the tower take part in the model's next call, if that has no images.

        Processes wait for each other's gradients, and for the weights of a tower that is shared
        out; one of them may have no images. The features of a blank one then come to nothing where
        those of images would come in: among the embeddings of tokens.
        """
        has_images = inputs.get("pixel_values") is not None
        if has_images or blank is None or not (self.training or is_sharded(self)):
            yield
            return

        def add_nothing(layer: nn.Module, args: Any, embedded: Tensor) -> Tensor:
            handle.remove()  # the words of an answer follow one by one
            image = {
                k: v.to(embedded.dtype) if v.is_floating_point() else v for k, v in blank.items()
            }
            given = self.model.get_image_features(**image, return_dict=True)
            found = tree_leaves([given[key] for key in given if key not in UNTAKEN])
            return embedded + sum(features.flatten()[:0].sum() for features in found)

        handle = self.model.get_input_embeddings().register_forward_hook(add_nothing)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, blank: dict[str, Tensor] | None = None, **options: Any
    ) -> Tensor:
        """New tokens ``[batch, length]``.

        Args:
            input_ids: Padded on the left, ``[batch, length]``.
            blank: See `forward`.
            options: What else the model takes, and options of transformers' ``generate``.
        """
        # Processes that hold parts of the network make as many steps as the one that makes most.
        synced = is_sharded(self)
        with self._tower_runs(options, blank):
            tokens = self.model.generate(input_ids=input_ids, synced_gpus=synced, **options)
        return tokens[:, input_ids.shape[1] :]


def _weighs(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _mergers(tower: nn.Module, width: int) -> list[nn.Module]:
    """What follows a tower's blocks, and gives features of a language model's width."""
    children = list(tower.children())
    blocks = [i for i, child in enumerate(children) if isinstance(child, nn.ModuleList)]
    after = children[blocks[0] + 1 :] if blocks else []
    linear = {m: [each for each in m.modules() if isinstance(each, nn.Linear)] for m in after}
    return [m for m, found in linear.items() if found and found[-1].out_features == width]


def pretrained_model(name: str, dtype: torch.dtype | Literal["auto"] = torch.float32) -> nn.Module:
    """A model that takes images and text, each weight read into place.

    Where the network is to be shared out, its weights stay in their files.

    Args:
        name: A folder, or a name on the hub.
        dtype: The type it is read in; "auto" is that of its files.

    Raises:
        ValueError: There is none of the name, or its weights are not whole.
    """
    from transformers import AutoModelForImageTextToText

    kind = AutoModelForImageTextToText
    if (waiting := deferred()) is not None:
        with _explained(kind, name):
            return without_weights(kind, name, waiting).eval()
    model, told = _read(kind, name, dtype=dtype, output_loading_info=True)
    if told["missing_keys"]:
        lost = sorted(told["missing_keys"])
        raise ValueError(f"the weights of {name} lack {lost[0]} ({len(lost)} in all)")
    return model.eval()


@cache
def processor_of(name: str) -> Any:
    """The processor of a checkpoint: a folder, or a name on the hub."""
    from transformers import AutoProcessor

    return _read(AutoProcessor, name)


def positions_of(name: str) -> int:
    """How many tokens the language model of a checkpoint was made for."""
    from transformers import AutoConfig

    return int(_read(AutoConfig, name).get_text_config().max_position_embeddings)


def _read(kind: Any, name: str, **options: Any) -> Any:
    with _explained(kind, name):
        return kind.from_pretrained(name, **options)


@contextmanager
def _explained(kind: Any, name: str) -> Iterator[None]:
    """Says in a line what could not be read."""
    try:
        with bars_on_screens_only():
            yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{kind.__name__} cannot read {name}: {reason}") from error

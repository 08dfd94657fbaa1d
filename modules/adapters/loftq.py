"""LoftQ (Li et al., arXiv 2310.08659): LoRA that begins from what 4 bits take of a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .delta import WeightInfo
from .errors import AdapterError
from .lora import LoRA, LoRADelta
from .quantized import is_quantized
from .starts import check_scale, low_rank


class LoftQDelta(LoRADelta):
    """``dW = s B A`` beside a quantised Q, begun as the nearest of its rank to W - Q.

    That is algorithm 1 of the article with T = 1, where Q is the plain quantisation of W: the base
    depends on nothing that the adapter holds.

    Attributes:
        waiting: Whether it has not begun, for its weight is not quantised yet.
    """

    waiting = False

    def start(self) -> None:
        """Waits for `begin`; until then dW is zero."""
        if is_quantized(self._stored()):
            raise AdapterError(
                f"{self.info.name} is quantised already, and LoftQ begins from what that takes of "
                "it: inject first, and quantise then"
            )
        self.waiting = True

    @torch.no_grad()
    def begin(self, original: Tensor) -> None:
        """Makes up for what has been lost, unless a file gave the factors.

        Args:
            original: The weight as it was before it was quantised.
        """
        if self.waiting and not original.is_meta:
            dtype = self.info.dtype
            lost = original.to(dtype) - self.weight().to(dtype)
            start_B, start_A = low_rank(lost / self.scale, self.rank)
            self.lora_B.copy_(start_B)
            self.lora_A.copy_(start_A)
        self.waiting = False

    def check(self) -> None:
        """Raises unless the weight is quantised."""
        if not is_quantized(self._stored()):
            raise AdapterError(
                f"LoftQ makes up for what 4 bits take of a weight, and {self.info.name} is not "
                "held in them: set base_dtype to nf4, or exclude it"
            )

    def _stored(self) -> Tensor:
        """The whole weight, of which this may change a part."""
        assert self.base is not None, "bind comes first"
        return self.base.whole()


def loftq_deltas(model: nn.Module) -> list[LoftQDelta]:
    """The deltas of LoftQ in a model or a layer."""
    return [module for module in model.modules() if isinstance(module, LoftQDelta)]


@dataclass(kw_only=True)
class LoftQ(LoRA):
    """LoftQ for every weight that ``targets`` names: linear layers, quantised afterwards.

    The scale is taken out of the start, so that ``Q + s B A`` is as near to W for any ``alpha``.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self)

    def delta_class(self, info: WeightInfo) -> type[LoRADelta]:
        """That of LoftQ; raises if the weight is not a linear layer's."""
        if info.kind != "linear" or len(info.shape) != 2:
            raise AdapterError(
                f"{info.name} is no linear layer's weight, which alone is quantised: exclude it "
                "from LoftQ"
            )
        return LoftQDelta

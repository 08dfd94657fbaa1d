"""Connectors: from features of an image to embeddings of a language model."""

from __future__ import annotations

from torch import Tensor, nn

CONNECTORS = ("linear", "mlp", "pixel_shuffle")
SHUFFLE = 2  # neighbours on each axis that pixel_shuffle puts into one token


class Connector(nn.Sequential):
    """Takes a map of features to a sequence of embeddings.

    ``linear`` and ``mlp`` (two layers, GELU between) are those of LLaVA and LLaVA-1.5
    (arXiv:2310.03744); ``pixel_shuffle`` first puts 2 x 2 neighbours into one token, and norms it,
    as InternVL-1.5 (arXiv:2404.16821) does: a fourth of the tokens.

    Attributes:
        shuffle: Neighbours on each axis that become one token.
    """

    def __init__(self, kind: str, channels: int, width: int) -> None:
        """Makes one.

        Args:
            kind: ``linear``, ``mlp`` or ``pixel_shuffle``.
            channels: Of the features.
            width: Of the embeddings.
        """
        if kind not in CONNECTORS:
            raise ValueError(f"connector {kind!r} is none of {', '.join(CONNECTORS)}")
        self_shuffle = SHUFFLE if kind == "pixel_shuffle" else 1
        taken = channels * self_shuffle**2
        norm = [nn.LayerNorm(taken)] if kind == "pixel_shuffle" else []
        rest = [] if kind == "linear" else [nn.GELU(), nn.Linear(width, width)]
        super().__init__(*norm, nn.Linear(taken, width), *rest)
        self.shuffle = self_shuffle

    def tokens(self, height: int, width: int) -> int:
        """How many tokens a map of a size becomes.

        Raises:
            ValueError: The map cannot be divided so.
        """
        if height % self.shuffle or width % self.shuffle:
            raise ValueError(
                f"pixel_shuffle needs maps of even sides, not {height} x {width}: take another "
                "img_size"
            )
        return height * width // self.shuffle**2

    def forward(self, features: Tensor) -> Tensor:
        """Takes features ``[n, channels, h, w]`` to embeddings ``[n, tokens, width]``."""
        n, channels, height, width = features.shape
        s = self.shuffle
        split = features.view(n, channels, height // s, s, width // s, s)
        tokens = split.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, channels * s * s)
        return super().forward(tokens)

"""A codebook that learns by the gradient of a loss (van den Oord et al. 2017, eq. 3, the second term)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae2.quantizers.codebook import CodebookConfig, CodebookQuantizer, mean_square


class GradientConfig(CodebookConfig):
    """Settings of a loss-based codebook."""

    kind: Literal["gradient"] = "gradient"

    def build(self) -> "GradientQuantizer":
        """The quantizer, with a random codebook."""
        return GradientQuantizer(self)


class GradientQuantizer(CodebookQuantizer):
    """Codebook that the optimizer moves: ‖sg[z] − e‖² pulls each code to the features that choose it.

    `restarted` (K,) tells which codes the latest update has put elsewhere; an optimizer's moments of these rows belong
    to the vectors before.
    """

    def __init__(self, config: GradientConfig) -> None:
        super().__init__(config)
        self.restarted: Tensor | None = None
        self.embedding = nn.Parameter(torch.empty(config.codebook_size, config.codebook_dim or config.code_dim))
        nn.init.uniform_(self.embedding, -1 / config.codebook_size, 1 / config.codebook_size)

    def update(self) -> None:
        self.restarted = None
        super().update()

    @property
    def vectors(self) -> Tensor:
        return F.normalize(self.embedding, dim=-1) if self.config.cosine else self.embedding

    def _codebook_loss(self, rows: Tensor, quantized: Tensor) -> Tensor:
        return mean_square(rows - quantized)

    def _set_vectors(self, vectors: Tensor, usage: Tensor, where: Tensor) -> None:
        self.embedding.copy_(torch.where(where[:, None], vectors, self.embedding))
        self.restarted = where

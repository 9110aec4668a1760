"""A codebook trained by gradient descent (van den Oord et al. 2017, eq. 3, second term)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae2.quantizers.codebook import CodebookConfig, CodebookQuantizer, mean_square


class GradientConfig(CodebookConfig):
    """Settings of a codebook trained by gradient descent.

    >>> config = GradientConfig(codebook_size=512, code_dim=64)
    >>> type(config.build()).__name__
    'GradientQuantizer'
    """

    kind: Literal["gradient"] = "gradient"

    def build(self) -> "GradientQuantizer":
        """Build the quantizer with a random codebook."""
        return GradientQuantizer(self)


class GradientQuantizer(CodebookQuantizer):
    """Codebook trained by the optimizer with the codebook loss ‖sg[z] − e‖².

    `restarted` is a (K,) bool mask of the codes that the last `update` replaced, None if it replaced none. The
    optimizer's moments of these rows are stale and should be reset.

    >>> quantizer = GradientConfig(codebook_size=512, code_dim=64).build()
    >>> output = quantizer(torch.randn(8, 64, 16, 16))
    >>> output.quantized.shape, output.codes.shape
    (torch.Size([8, 64, 16, 16]), torch.Size([8, 16, 16]))
    >>> sorted(output.loss_terms)
    ['codebook', 'commitment']
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
    def codebook(self) -> Tensor:
        return F.normalize(self.embedding, dim=-1) if self.config.cosine else self.embedding

    def _codebook_loss(self, latents: Tensor, quantized: Tensor) -> Tensor:
        return mean_square(latents - quantized)

    def _replace_codes(self, vectors: Tensor, cluster_size: Tensor, mask: Tensor) -> None:
        self.embedding.copy_(torch.where(mask[:, None], vectors, self.embedding))
        self.restarted = mask

"""A codebook of exponential moving averages of the assigned features (van den Oord et al. 2017, appendix A.1)."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vqvae2.quantizers.codebook import CodebookConfig, CodebookQuantizer


class EMAConfig(CodebookConfig):
    """Settings of an EMA codebook.

    >>> config = EMAConfig(codebook_size=512, code_dim=64, ema_decay=0.99)
    >>> type(config.build()).__name__
    'EMAQuantizer'
    """

    kind: Literal["ema"] = "ema"
    epsilon: float = Field(default=1e-5, gt=0, description="Laplace smoothing of the cluster sizes")

    def build(self) -> "EMAQuantizer":
        """Build the quantizer with a random codebook."""
        return EMAQuantizer(self)


class EMAQuantizer(CodebookQuantizer):
    """Codebook of exponential moving averages. The codebook receives no gradient.

    >>> quantizer = EMAConfig(codebook_size=512, code_dim=64).build()
    >>> output = quantizer(torch.randn(8, 64, 16, 16))
    >>> output.quantized.shape, output.codes.shape
    (torch.Size([8, 64, 16, 16]), torch.Size([8, 16, 16]))
    >>> quantizer.update()  # after every optimizer step
    >>> quantizer.lookup(output.codes).shape
    torch.Size([8, 64, 16, 16])
    """

    embedding: Tensor  # (K, width), e_i
    ema_embedding_sum: Tensor  # (K, width), m_i

    def __init__(self, config: EMAConfig) -> None:
        super().__init__(config)
        vectors = torch.randn(config.codebook_size, config.codebook_dim or config.code_dim)
        if config.cosine:
            vectors = F.normalize(vectors, dim=-1)
        self.epsilon = config.epsilon
        self.register_buffer("embedding", vectors)
        self.register_buffer("ema_embedding_sum", vectors.clone())

    @property
    def codebook(self) -> Tensor:
        return self.embedding

    def _codebook_loss(self, latents: Tensor, quantized: Tensor) -> None:
        return None

    def _update_codebook(self, counts: Tensor, sums: Tensor) -> None:
        """Apply m ← γm + (1−γ)Σz and e = m / N, with Laplace smoothing of N. The caller has updated N."""
        self.ema_embedding_sum.lerp_(sums, 1 - self.config.ema_decay)
        total = self.ema_cluster_size.sum()
        smoothed = (self.ema_cluster_size + self.epsilon) / (total + self.codebook_size * self.epsilon) * total
        vectors = self.ema_embedding_sum / smoothed[:, None]
        self.embedding.copy_(F.normalize(vectors, dim=-1) if self.config.cosine else vectors)

    def _replace_codes(self, vectors: Tensor, cluster_size: Tensor, mask: Tensor) -> None:
        if self.config.cosine:
            vectors = F.normalize(vectors, dim=-1)
        self.embedding.copy_(torch.where(mask[:, None], vectors, self.embedding))
        # Without new sums, the next update would undo the replacement.
        sums = vectors * cluster_size[:, None]
        self.ema_embedding_sum.copy_(torch.where(mask[:, None], sums, self.ema_embedding_sum))

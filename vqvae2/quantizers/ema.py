"""A codebook that is the moving average of the features that choose it (van den Oord et al. 2017, appendix A.1)."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vqvae2.quantizers.codebook import CodebookConfig, CodebookQuantizer


class EMAConfig(CodebookConfig):
    """Settings of an EMA codebook."""

    kind: Literal["ema"] = "ema"
    epsilon: float = Field(default=1e-5, ge=0, description="Laplace smoothing of the counts")

    def build(self) -> "EMAQuantizer":
        """The quantizer, with a random codebook."""
        return EMAQuantizer(self)


class EMAQuantizer(CodebookQuantizer):
    """Codebook learned by exponential moving averages; no gradient reaches it."""

    embedding: Tensor  # (K, width) e_i
    ema_embedding_sum: Tensor  # (K, width) m_i

    def __init__(self, config: EMAConfig) -> None:
        super().__init__(config)
        vectors = torch.randn(config.codebook_size, config.codebook_dim or config.code_dim)
        if config.cosine:
            vectors = F.normalize(vectors, dim=-1)
        self.epsilon = config.epsilon
        self.register_buffer("embedding", vectors)
        self.register_buffer("ema_embedding_sum", vectors.clone())

    @property
    def vectors(self) -> Tensor:
        return self.embedding

    def _codebook_loss(self, rows: Tensor, quantized: Tensor) -> None:
        return None

    def _learn(self, counts: Tensor, sums: Tensor) -> None:
        """N ← γN + (1−γ)n (done by the caller), m ← γm + (1−γ)Σz, e = m / N with Laplace smoothing of N."""
        self.ema_embedding_sum.lerp_(sums, 1 - self.config.ema_decay)
        total = self.ema_cluster_size.sum()
        smoothed = (self.ema_cluster_size + self.epsilon) / (total + self.codebook_size * self.epsilon) * total
        vectors = self.ema_embedding_sum / smoothed[:, None]
        self.embedding.copy_(F.normalize(vectors, dim=-1) if self.config.cosine else vectors)

    def _set_vectors(self, vectors: Tensor, usage: Tensor, where: Tensor) -> None:
        if self.config.cosine:
            vectors = F.normalize(vectors, dim=-1)
        # The sums start again with the code: left alone, they would undo the restart at the next update.
        self.embedding.copy_(torch.where(where[:, None], vectors, self.embedding))
        self.ema_embedding_sum.copy_(torch.where(where[:, None], vectors * usage[:, None], self.ema_embedding_sum))

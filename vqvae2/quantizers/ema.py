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
    sums: Tensor  # (K, width) m_i

    def __init__(self, config: EMAConfig) -> None:
        super().__init__(config)
        vectors = torch.randn(config.codes, config.project_to or config.dim)
        if config.cosine:
            vectors = F.normalize(vectors, dim=-1)
        self.epsilon = config.epsilon
        self.register_buffer("embedding", vectors)
        self.register_buffer("sums", vectors.clone())

    @property
    def vectors(self) -> Tensor:
        return self.embedding

    def _codebook_loss(self, rows: Tensor, quantized: Tensor) -> None:
        return None

    def _learn(self, counts: Tensor, sums: Tensor) -> None:
        """N ← γN + (1−γ)n (done by the caller), m ← γm + (1−γ)Σz, e = m / N with Laplace smoothing of N."""
        self.sums.lerp_(sums, 1 - self.config.decay)
        total = self.usage.sum()
        smoothed = (self.usage + self.epsilon) / (total + self.codes * self.epsilon) * total
        vectors = self.sums / smoothed[:, None]
        self.embedding.copy_(F.normalize(vectors, dim=-1) if self.config.cosine else vectors)

    def _set_vectors(self, vectors: Tensor, usage: Tensor, where: Tensor) -> None:
        if self.config.cosine:
            vectors = F.normalize(vectors, dim=-1)
        # The sums start again with the code: left alone, they would undo the restart at the next update.
        self.embedding.copy_(torch.where(where[:, None], vectors, self.embedding))
        self.sums.copy_(torch.where(where[:, None], vectors * usage[:, None], self.sums))

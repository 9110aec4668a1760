"""SimVQ (Zhu et al. 2024, arXiv 2411.02038): a frozen random codebook, and a learned linear map of all its codes.

The map moves all codes together, so that unused codes follow the used ones, also in large codebooks.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from vqvae2.quantizers.codebook import CodebookConfig, CodebookQuantizer, mean_square


class SimVQConfig(CodebookConfig):
    """Settings of SimVQ. The codebook is frozen, so it is neither initialized with k-means nor restarted.

    >>> SimVQConfig(codebook_size=8192, code_dim=64).build().lookup(torch.tensor([[8191]])).shape
    torch.Size([1, 64, 1])
    """

    kind: Literal["simvq"] = "simvq"
    kmeans_init: bool = Field(default=False, description="false: the codebook is not initialized with k-means")
    dead_code_threshold: float = Field(default=0.0, ge=0, le=0, description="0: codes are never restarted")

    @field_validator("kmeans_init")
    @classmethod
    def _check_kmeans_init(cls, value: bool) -> bool:
        if value:
            raise ValueError("must be false: the codebook of SimVQ is frozen")
        return value

    def build(self) -> "SimVQuantizer":
        """Build the quantizer with a random codebook and a random map."""
        return SimVQuantizer(self)


class SimVQuantizer(CodebookQuantizer):
    """The codes are `frozen @ map.weight.T`. The optimizer trains the map with the codebook loss ‖sg[z] − e‖².

    >>> quantizer = SimVQConfig(codebook_size=512, code_dim=64).build()
    >>> output = quantizer(torch.randn(8, 64, 16, 16))
    >>> output.quantized.shape, output.codes.shape
    (torch.Size([8, 64, 16, 16]), torch.Size([8, 16, 16]))
    """

    frozen: Tensor  # (K, width)

    def __init__(self, config: SimVQConfig) -> None:
        super().__init__(config)
        width = config.codebook_dim or config.code_dim
        self.register_buffer("frozen", torch.randn(config.codebook_size, width) * width**-0.5)
        self.map = nn.Linear(width, width, bias=False)

    @property
    def codebook(self) -> Tensor:
        codes = self.map(self.frozen)
        return F.normalize(codes, dim=-1) if self.config.cosine else codes

    def _codebook_loss(self, latents: Tensor, quantized: Tensor) -> Tensor:
        return mean_square(latents - quantized)

    def _replace_codes(self, vectors: Tensor, cluster_size: Tensor, mask: Tensor) -> None:
        raise AssertionError("unreachable: the config allows neither k-means nor restarts")

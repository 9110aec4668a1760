"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505): a fixed grid instead of a learned codebook."""

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from vqvae2.config import Config
from vqvae2.quantizers.base import MAX_CODES, Quantizer, QuantizerOutput
from vqvae2.quantizers.gradient_estimators import straight_through

_EPSILON = 1e-3  # keeps the outermost grid values away from the asymptotes of tanh


class FSQConfig(Config):
    """Settings of finite scalar quantization.

    >>> FSQConfig(grid=(8, 8, 8)).codebook_size
    512
    """

    kind: Literal["fsq"] = "fsq"
    grid: tuple[Annotated[int, Field(ge=2, le=MAX_CODES)], ...] = Field(
        default=(8, 8, 8), min_length=1, description="values per dimension, 2 or more"
    )
    code_dim: int = Field(default=64, ge=1, le=2**14, description="channels of the features to quantize")

    @model_validator(mode="after")
    def _check_grid(self) -> "FSQConfig":
        if self.codebook_size > MAX_CODES:
            raise ValueError(f"grid: must have at most {MAX_CODES:,} codes, the product of its values")
        return self

    @property
    def codebook_size(self) -> int:
        """Number of codes, the product of `grid`."""
        return math.prod(self.grid)

    def build(self) -> "FSQuantizer":
        """Build the quantizer with random projections."""
        return FSQuantizer(self)


class FSQuantizer(Quantizer):
    """Project features to a few dimensions, bound each and round it. There is no codebook and no quantization loss.

    >>> quantizer = FSQConfig(grid=(8, 8, 8), code_dim=64).build()
    >>> output = quantizer(torch.randn(8, 64, 16, 16))
    >>> output.quantized.shape, output.codes.shape
    (torch.Size([8, 64, 16, 16]), torch.Size([8, 16, 16]))
    >>> quantizer.lookup(output.codes).shape
    torch.Size([8, 64, 16, 16])
    """

    grid: Tensor  # (G,) number of values of each dimension
    basis: Tensor  # (G,) place value of each dimension in a code

    def __init__(self, config: FSQConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size, self.code_dim = config.codebook_size, config.code_dim
        self.project_in = nn.Linear(config.code_dim, len(config.grid))
        self.project_out = nn.Linear(len(config.grid), config.code_dim)
        grid = torch.tensor(config.grid)
        self.register_buffer("grid", grid)
        self.register_buffer("basis", torch.cumprod(torch.cat([grid.new_ones(1), grid[:-1]]), 0))

    def forward(self, features: Float[Tensor, "b d *spatial"]) -> QuantizerOutput:
        self._check_features(features)
        with torch.autocast(features.device.type, enabled=False):
            bounded = self._bound(self.project_in(features.float().movedim(1, -1)))
            # The margin of `_bound` exceeds half a value if `grid` is larger than 1,000.
            rounded = bounded.round().clamp(-(self.grid // 2), (self.grid - 1) // 2)
            digits = rounded.detach().long() + self.grid // 2
            codes = (digits * self.basis).sum(-1)
            values = straight_through(bounded, rounded) if bounded.requires_grad else rounded
            return QuantizerOutput(self._to_features(values), codes, bounded.new_zeros(()), {})

    def lookup(self, codes: Int[Tensor, "b *spatial"]) -> Float[Tensor, "b d *spatial"]:
        with torch.autocast(codes.device.type, enabled=False):
            digits = codes[..., None] // self.basis % self.grid
            return self._to_features((digits - self.grid // 2).float())

    def _bound(self, latents: Float[Tensor, "*b g"]) -> Float[Tensor, "*b g"]:
        """Squash latents so that rounding gives exactly `grid` distinct integers in each dimension."""
        half = (self.grid - 1) * (1 + _EPSILON) / 2
        offset = torch.where(self.grid % 2 == 0, 0.5, 0.0)
        return torch.tanh(latents + torch.atanh(offset / half)) * half - offset

    def _to_features(self, values: Float[Tensor, "*b g"]) -> Float[Tensor, "..."]:
        """Scale integers to [-1, 1] and project them to (B, code_dim, *spatial)."""
        return self.project_out(values / (self.grid // 2)).movedim(-1, 1)

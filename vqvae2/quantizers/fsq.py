"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505): a grid in place of a learned codebook."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from vqvae2.config import Config
from vqvae2.quantizers.base import Quantizer, QuantizerOutput, straight_through

_EPSILON = 1e-3  # keeps tanh off its asymptotes, so that the outermost values can be reached


class FSQConfig(Config):
    """Settings of finite scalar quantization; the number of codes is the product of `grid`."""

    kind: Literal["fsq"] = "fsq"
    grid: tuple[int, ...] = Field(default=(8, 8, 8), min_length=1, description="values of each dimension, 2 or more")
    code_dim: int = Field(default=64, ge=1, description="width of the features that are quantized")

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return math.prod(self.grid)

    def build(self) -> "FSQuantizer":
        """The quantizer."""
        return FSQuantizer(self)


class FSQuantizer(Quantizer):
    """Projects features to a few dimensions, bounds each and rounds it: no codebook, no loss, no code dies."""

    grid: Tensor
    basis: Tensor

    def __init__(self, config: FSQConfig) -> None:
        super().__init__()
        if min(config.grid) < 2:
            raise ValueError(f"grid must have at least 2 values in each dimension, not {min(config.grid)}")
        self.config = config
        self.codebook_size, self.code_dim = config.codebook_size, config.code_dim
        self.project_in = nn.Linear(config.code_dim, len(config.grid))
        self.project_out = nn.Linear(len(config.grid), config.code_dim)
        grid = torch.tensor(config.grid)
        self.register_buffer("grid", grid)
        self.register_buffer("basis", torch.cumprod(torch.cat([grid.new_ones(1), grid[:-1]]), 0))

    def forward(self, features: Float[Tensor, "b d *spatial"]) -> QuantizerOutput:
        self._check_width(features)
        with torch.autocast(features.device.type, enabled=False):
            bounded = self._bound(self.project_in(features.float().movedim(1, -1)))
            rounded = bounded.round()
            digits = rounded.detach().long() + self.grid // 2
            codes = (digits * self.basis).sum(-1)
            values = straight_through(bounded, rounded) if bounded.requires_grad else rounded
            return QuantizerOutput(self._leave(values), codes, bounded.new_zeros(()), {})

    def lookup(self, codes: Int[Tensor, "b *spatial"]) -> Float[Tensor, "b d *spatial"]:
        with torch.autocast(codes.device.type, enabled=False):
            digits = codes[..., None] // self.basis % self.grid
            return self._leave((digits - self.grid // 2).float())

    def _bound(self, latents: Float[Tensor, "*b g"]) -> Float[Tensor, "*b g"]:
        """Latents squashed so that rounding gives exactly `grid` different whole numbers in each dimension."""
        half = (self.grid - 1) * (1 + _EPSILON) / 2
        offset = torch.where(self.grid % 2 == 0, 0.5, 0.0)
        return torch.tanh(latents + torch.atanh(offset / half)) * half - offset

    def _leave(self, values: Tensor) -> Tensor:
        return self.project_out(values / (self.grid // 2)).movedim(-1, 1)

"""Gated PixelCNN (van den Oord et al. 2016, arXiv 1606.05328), the prior of the first VQ-VAE paper.

A vertical stack sees all rows above, a horizontal one what lies to the left on the row and, in every layer, the
vertical one. Both see their input shifted by one (down, right), so that every later tap may include its own position.
In sampling the vertical stack is evaluated once a row for all columns: nothing on the current row reaches it.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from vqvae2.code_maps import CodeMaps
from vqvae2.config import Config
from vqvae2.priors.base import Column, IncrementalDecoder, Prior, PriorSpec
from vqvae2.priors.conditioning import Conditioner
from vqvae2.priors.layers import CausalConv2d, Pointwise, coordinate_map, upsample_to
from vqvae2.priors.toom_cook import IncrementalRowConv


class PixelCNNConfig(Config):
    """The network."""

    kind: Literal["pixelcnn"] = "pixelcnn"
    channels: int = Field(default=256, ge=1, description="hidden units")
    kernel: int = Field(default=5, ge=3, description="columns of a convolution, odd; it sees half as many rows above")
    layers: int = Field(default=15, ge=1)
    output_channels: int = Field(default=512, ge=1, description="hidden units between the last layer and the logits")
    condition_layers: int = Field(default=3, ge=0, description="residual blocks over the coarser levels' codes")
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> "PixelCNNConfig":
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {self.kernel}")
        return self

    def build(self, spec: PriorSpec) -> "PixelCNN":
        """The network for code maps as in `spec`, with random weights."""
        return PixelCNN(self, spec)


class PixelCNN(Prior):
    """See `Prior` for what goes in and comes out."""

    def __init__(self, config: PixelCNNConfig, spec: PriorSpec) -> None:
        super().__init__(spec)
        self.config = config
        channels = config.channels
        self.conditioner = Conditioner.if_needed(spec, channels, config.kernel, config.condition_layers, config.dropout)
        self.embedding = nn.Embedding(spec.level.codebook_size, channels)
        self.coordinates = Pointwise(2, channels)
        self.layers = nn.ModuleList(
            Layer(config, conditioned=self.conditioner is not None) for _ in range(config.layers)
        )
        self.hidden = Pointwise(channels, config.output_channels)
        self.logits = Pointwise(config.output_channels, spec.level.codebook_size)

    def forward(
        self, codes: Int[Tensor, "b h w"], coarser: CodeMaps = (), labels: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b k h w"]:
        self._check_coarser(coarser)
        batch, height, width = codes.shape
        condition = self.conditioner(batch, coarser, labels) if self.conditioner else None
        coordinates = self.coordinates(coordinate_map(height, width, codes.device)[None])
        embedded = self.embedding(codes).movedim(-1, 1)
        down = F.pad(embedded, (0, 0, 1, 0))[:, :, :-1] + coordinates
        right = F.pad(embedded, (1, 0))[:, :, :, :-1] + coordinates
        for layer in self.layers:
            down, right = self._run(layer, down, right, condition)
        return self.logits(F.relu(self.hidden(F.relu(right))))

    @torch.inference_mode()
    def incremental_decoder(
        self, batch: int, coarser: CodeMaps = (), labels: Int[Tensor, " b"] | None = None
    ) -> IncrementalDecoder:
        self._check_coarser(coarser)
        condition = self.conditioner(batch, coarser, labels) if self.conditioner else None
        return _IncrementalPixelCNN(self, batch, condition)


class Layer(nn.Module):
    """One layer of both stacks; the horizontal one is residual."""

    def __init__(self, config: PixelCNNConfig, conditioned: bool) -> None:
        super().__init__()
        channels, kernel = config.channels, config.kernel
        self.rows = kernel // 2 + 1
        self.vertical = nn.Conv2d(channels, 2 * channels, (self.rows, kernel))
        weight_norm(self.vertical, "weight")
        self.horizontal = CausalConv2d(channels, 2 * channels, kernel, rows_above=0)
        self.across = Pointwise(2 * channels, 2 * channels)
        self.out = Pointwise(channels, channels)
        self.condition = Pointwise(channels, 2 * channels, bias=False) if conditioned else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, down: Tensor, right: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        side = self.horizontal.padding
        vertical = self.vertical(F.pad(down, (side, side, self.rows - 1, 0)))
        horizontal = self.horizontal(right) + self.across(vertical)
        if self.condition is not None and condition is not None:
            given = upsample_to(self.condition(condition), *vertical.shape[2:])
            vertical, horizontal = vertical + given, horizontal + given
        return gate(vertical, 1), right + self.out(self.dropout(gate(horizontal, 1)))


def gate(x: Tensor, dim: int) -> Tensor:
    """tanh of the first half times the logistic function of the second (eq. 2)."""
    value, opening = x.chunk(2, dim)
    return torch.tanh(value) * torch.sigmoid(opening)


class _IncrementalPixelCNN(IncrementalDecoder):
    def __init__(self, model: PixelCNN, batch: int, condition: Float[Tensor, "b c h w"] | None) -> None:
        height, width = model.spec.level.shape
        self.condition = None if condition is None else condition.permute(2, 3, 0, 1).contiguous()
        self.height, self.width, self.batch = height, width, batch
        self.embedding = model.embedding.weight.detach()
        coordinates = coordinate_map(height, width, self.embedding.device).permute(1, 2, 0)
        self.coordinates = model.coordinates.incremental()(coordinates)  # (H, W, C)
        # Embedded codes: of the row above, and of the current one, shifted by one to the right.
        self.above = self.embedding.new_zeros(width, batch, self.embedding.shape[1])
        self.current = self.embedding.new_zeros(width + 1, batch, self.embedding.shape[1])
        self.row_coordinates = self.coordinates[0].clone()
        self.layers = [_IncrementalLayer(layer, batch, width) for layer in model.layers if isinstance(layer, Layer)]
        self.hidden, self.to_logits = model.hidden.incremental(), model.logits.incremental()

    @torch.inference_mode()
    def begin_row(self, row: int) -> None:
        self.row_coordinates.copy_(self.coordinates[row])
        if row > 0:
            self.above.copy_(self.current[1:])
        condition = None if self.condition is None else self.condition[row * len(self.condition) // self.height]
        down = self.above + self.coordinates[row][:, None]
        for layer in self.layers:
            down = layer.begin_row(row, down, condition)

    @torch.inference_mode()
    def logits(self, column: Column) -> Float[Tensor, "b k"]:
        right = (self.row_coordinates[column] + self.current[column]).view(self.batch, -1)
        for layer in self.layers:
            right = layer.at(column, right)
        return self.to_logits(F.relu(self.hidden(F.relu(right))))

    @torch.inference_mode()
    def set_codes(self, column: Column, codes: Int[Tensor, " b"]) -> None:
        embedded = F.embedding(codes, self.embedding)
        if isinstance(column, Tensor):
            self.current.index_copy_(0, column + 1, embedded[None])
        else:
            self.current[column + 1] = embedded


class _IncrementalLayer:
    def __init__(self, layer: Layer, batch: int, width: int) -> None:
        weight = layer.vertical.weight.detach()  # (2C, C, rows, kernel), weight norm folded
        self.vertical = IncrementalRowConv(weight, batch, width)
        self.bias = weight.new_zeros(()) if layer.vertical.bias is None else layer.vertical.bias.detach()
        self.horizontal = layer.horizontal.incremental(batch, width)
        self.across, self.out = layer.across.incremental(), layer.out.incremental()
        self.condition = layer.condition.incremental() if layer.condition else None
        self.width = width

    def begin_row(self, row: int, down: Float[Tensor, "w b c"], condition: Tensor | None) -> Float[Tensor, "w b c"]:
        """Take in a row of the vertical stack, prepare the horizontal one, and give the vertical stack's output."""
        self.vertical.push(down.transpose(0, 1))
        vertical = self.vertical.contribution().transpose(1, 2) + self.bias
        prepared = self.across(vertical)
        if self.condition is not None and condition is not None:
            given = self.condition(condition)
            if 1 < len(given) < self.width:
                given = given.repeat_interleave(self.width // len(given), 0)
            vertical, prepared = vertical + given, prepared + given
        self.horizontal.begin_row(row, prepared)
        return gate(vertical, 2)

    def at(self, column: Column, right: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        """The horizontal stack's output at this column."""
        self.horizontal.put(column, right)
        return right + self.out(gate(self.horizontal.at(column), 1))

"""Gated PixelCNN (van den Oord et al. 2016, arXiv 1606.05328), the prior of the first VQ-VAE paper.

The vertical stack sees all rows above. The horizontal stack sees the positions to the left and, in each layer, the
vertical stack. Their inputs are shifted by one position (down and right), so all taps may include the current position.
In sampling, the vertical stack is computed once per row for all columns, as it does not depend on the current row.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from vqvae2.config import Config
from vqvae2.priors.base import Column, IncrementalDecoder, OddKernelSize, Prior, PriorSpec
from vqvae2.priors.conditioning import Conditioner, ConditionRows
from vqvae2.priors.layers import CausalConv2d, PointwiseConv2d, coordinate_map, upsample_row, upsample_to
from vqvae2.priors.toom_cook import IncrementalRowConv


class PixelCNNConfig(Config):
    """Settings of the network."""

    kind: Literal["pixelcnn"] = "pixelcnn"
    channels: int = Field(default=256, ge=1, le=2**14, description="hidden channels")
    kernel: OddKernelSize = Field(default=5, description="columns of a convolution, odd; it has kernel // 2 rows above")
    layers: int = Field(default=15, ge=1, le=1024, description="number of layers")
    output_channels: int = Field(default=512, ge=1, le=2**14, description="hidden channels before the logits")
    condition_layers: int = Field(
        default=3, ge=0, le=1024, description="residual blocks over the coarser levels' codes"
    )
    dropout: float = Field(default=0.1, ge=0, lt=1)

    def build(self, spec: PriorSpec) -> "PixelCNN":
        """Build the network for the code maps of `spec`, with random weights."""
        return PixelCNN(self, spec)


class PixelCNN(Prior):
    """Gated PixelCNN prior. See `Prior` for inputs and outputs.

    >>> from vqvae2.code_maps import MapSpec
    >>> spec = PriorSpec(level=MapSpec(codebook_size=512, height=8, width=8))
    >>> prior = PixelCNNConfig(channels=8, layers=2, output_channels=16).build(spec)
    >>> prior(torch.zeros(2, 8, 8, dtype=torch.int64)).shape  # logits (B, K, H, W)
    torch.Size([2, 512, 8, 8])
    """

    def __init__(self, config: PixelCNNConfig, spec: PriorSpec) -> None:
        super().__init__(spec)
        self.config = config
        channels = config.channels
        self.conditioner = Conditioner.if_needed(spec, channels, config.kernel, config.condition_layers, config.dropout)
        self.embedding = nn.Embedding(spec.level.codebook_size, channels)
        self.coordinates = PointwiseConv2d(2, channels)
        self.layers = nn.ModuleList(
            PixelCNNLayer(config, conditioned=self.conditioner is not None) for _ in range(config.layers)
        )
        self.hidden = PointwiseConv2d(channels, config.output_channels)
        self.logits = PointwiseConv2d(config.output_channels, spec.level.codebook_size)

    def conditional_logits(
        self, codes: Int[Tensor, "b h w"], condition: Float[Tensor, "b c h2 w2"] | None
    ) -> Float[Tensor, "b k h w"]:
        coordinates = coordinate_map(codes.shape[1], codes.shape[2], codes.device).to(self.embedding.weight.dtype)
        coordinates = self.coordinates(coordinates[None])
        embedded = self.embedding(codes).movedim(-1, 1)
        vertical = F.pad(embedded, (0, 0, 1, 0))[:, :, :-1] + coordinates
        horizontal = F.pad(embedded, (1, 0))[:, :, :, :-1] + coordinates
        for layer in self.layers:
            vertical, horizontal = self._run_block(layer, vertical, horizontal, condition)
        return self.logits(F.relu(self.hidden(F.relu(horizontal))))

    def _make_incremental_decoder(self, batch: int, condition: Tensor | None) -> IncrementalDecoder:
        return _IncrementalPixelCNN(self, batch, condition)


class PixelCNNLayer(nn.Module):
    """One layer of both stacks, with a residual connection in the horizontal one."""

    def __init__(self, config: PixelCNNConfig, conditioned: bool) -> None:
        super().__init__()
        channels, kernel_size = config.channels, config.kernel
        self.rows = kernel_size // 2 + 1
        self.vertical = nn.Conv2d(channels, 2 * channels, (self.rows, kernel_size))
        weight_norm(self.vertical, "weight")
        self.horizontal = CausalConv2d(channels, 2 * channels, kernel_size, rows_above=0)
        self.across = PointwiseConv2d(2 * channels, 2 * channels)
        self.out = PointwiseConv2d(channels, channels)
        self.condition = PointwiseConv2d(channels, 2 * channels, bias=False) if conditioned else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, vertical: Tensor, horizontal: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        padding = self.horizontal.padding
        vertical_gates = self.vertical(F.pad(vertical, (padding, padding, self.rows - 1, 0)))
        horizontal_gates = self.horizontal(horizontal) + self.across(vertical_gates)
        if self.condition is not None and condition is not None:
            projected = upsample_to(self.condition(condition), *vertical_gates.shape[2:])
            vertical_gates, horizontal_gates = vertical_gates + projected, horizontal_gates + projected
        residual = self.out(self.dropout(gated_activation(horizontal_gates, 1)))
        return gated_activation(vertical_gates, 1), horizontal + residual


def gated_activation(gates: Tensor, dim: int) -> Tensor:
    """Return tanh of the first half of `gates` times the sigmoid of the second half (eq. 2)."""
    value, gate = gates.chunk(2, dim)
    return torch.tanh(value) * torch.sigmoid(gate)


class _IncrementalPixelCNN(IncrementalDecoder):
    def __init__(self, model: PixelCNN, batch: int, condition: Float[Tensor, "b c h w"] | None) -> None:
        height, width = model.spec.level.shape
        self.condition_rows = ConditionRows(condition, height)
        self.batch = batch
        self.embedding = model.embedding.weight.detach()
        coordinates = coordinate_map(height, width, self.embedding.device).to(self.embedding.dtype).permute(1, 2, 0)
        self.coordinates = model.coordinates.incremental()(coordinates)  # (H, W, C)
        # Embedded codes of the row above, and of the current row, shifted right by one.
        self.above = self.embedding.new_zeros(width, batch, self.embedding.shape[1])
        self.current = self.embedding.new_zeros(width + 1, batch, self.embedding.shape[1])
        self.row_coordinates = self.coordinates[0].clone()
        layers = (layer for layer in model.layers if isinstance(layer, PixelCNNLayer))
        self.layers = [_IncrementalLayer(layer, batch, width) for layer in layers]
        self.hidden, self.to_logits = model.hidden.incremental(), model.logits.incremental()

    @torch.inference_mode()
    def begin_row(self, row: int) -> None:
        self.row_coordinates.copy_(self.coordinates[row])
        if row > 0:
            self.above.copy_(self.current[1:])
        condition = self.condition_rows[row]
        vertical = self.above + self.coordinates[row][:, None]
        for layer in self.layers:
            vertical = layer.begin_row(row, vertical, condition)

    @torch.inference_mode()
    def logits(self, column: Column) -> Float[Tensor, "b k"]:
        horizontal = (self.row_coordinates[column] + self.current[column]).view(self.batch, -1)
        for layer in self.layers:
            horizontal = layer.step(column, horizontal)
        return self.to_logits(F.relu(self.hidden(F.relu(horizontal))))

    @torch.inference_mode()
    def set_codes(self, column: Column, codes: Int[Tensor, " b"]) -> None:
        embedded = F.embedding(codes, self.embedding)
        if isinstance(column, Tensor):
            self.current.index_copy_(0, column + 1, embedded[None])
        else:
            self.current[column + 1] = embedded


class _IncrementalLayer:
    def __init__(self, layer: PixelCNNLayer, batch: int, width: int) -> None:
        weight = layer.vertical.weight.detach()  # (2C, C, rows, kernel size), with weight norm folded in
        self.vertical = IncrementalRowConv(weight, batch, width)
        self.bias = weight.new_zeros(()) if layer.vertical.bias is None else layer.vertical.bias.detach()
        self.horizontal = layer.horizontal.incremental(batch, width)
        self.across, self.out = layer.across.incremental(), layer.out.incremental()
        self.condition = layer.condition.incremental() if layer.condition else None
        self.width = width

    def begin_row(self, row: int, vertical: Float[Tensor, "w b c"], condition: Tensor | None) -> Float[Tensor, "w b c"]:
        """Start a row, given the row of the vertical stack. Return the vertical stack's output for the row."""
        self.vertical.push(vertical.transpose(0, 1))
        vertical_gates = self.vertical.contribution().transpose(1, 2) + self.bias
        horizontal_gates = self.across(vertical_gates)
        if self.condition is not None and condition is not None:
            projected = upsample_row(self.condition(condition), self.width)
            vertical_gates, horizontal_gates = vertical_gates + projected, horizontal_gates + projected
        self.horizontal.begin_row(row, horizontal_gates)
        return gated_activation(vertical_gates, 2)

    def step(self, column: Column, horizontal: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        """Return the horizontal stack's output at a column of the current row."""
        self.horizontal.set_input(column, horizontal)
        return horizontal + self.out(gated_activation(self.horizontal.output(column), 1))

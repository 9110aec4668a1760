"""PixelSNAIL (Chen et al. 2018), the prior of VQ-VAE-2: gated causal convolutions with self-attention."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from vqvae2.code_maps import CodeMaps
from vqvae2.config import Config
from vqvae2.priors.attention import CausalAttention, WavefrontAttention
from vqvae2.priors.base import (
    Column,
    IncrementalDecoder,
    OddKernelSize,
    Prior,
    PriorSpec,
    Wave,
    WavefrontDecoder,
    WavefrontShape,
)
from vqvae2.priors.conditioning import Conditioner, ConditionRows
from vqvae2.priors.layers import CausalConv2d, GatedResidualBlock, PointwiseConv2d, coordinate_map
from vqvae2.priors.wavefront import WavefrontConv2d, WavefrontGatedResidualBlock, choose_skew


class PixelSNAILConfig(Config):
    """Settings of the network. In the paper, levels conditioned on coarser levels have no attention."""

    kind: Literal["pixelsnail"] = "pixelsnail"
    channels: int = Field(default=256, ge=2, le=2**14, description="hidden channels")
    residual_channels: int = Field(default=256, ge=1, le=2**14, description="hidden channels of a residual block")
    kernel: OddKernelSize = Field(default=5, description="rows and columns of a causal convolution, odd")
    blocks: int = Field(default=4, ge=1, le=64, description="number of blocks")
    layers: int = Field(default=4, ge=1, le=64, description="residual blocks in each block")
    attention: bool | tuple[int, ...] = Field(
        default=True, description="blocks that end with attention: all, none, or a list of block indices"
    )
    attention_order: Literal["raster", "wavefront"] = Field(
        default="raster", description="order of positions in attention; wavefront samples many rows at once"
    )
    heads: int = Field(default=8, ge=1, le=1024, description="attention heads")
    condition_layers: int = Field(
        default=3, ge=0, le=1024, description="residual blocks over the coarser levels' codes"
    )
    output_layers: int = Field(default=0, ge=0, le=1024, description="pointwise residual blocks before the logits")
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> "PixelSNAILConfig":
        if self.attention_blocks and (self.channels // 2) % self.heads:
            raise ValueError(f"half the channels ({self.channels // 2}) must be divisible by heads ({self.heads})")
        invalid = [block for block in self.attention_blocks if not 0 <= block < self.blocks]
        if invalid:
            raise ValueError(f"attention: no block {invalid[0]}; block indices are 0 to {self.blocks - 1}")
        return self

    @property
    def attention_blocks(self) -> frozenset[int]:
        """Indices of the blocks that end with attention."""
        if isinstance(self.attention, bool):
            return frozenset(range(self.blocks) if self.attention else ())
        return frozenset(self.attention)

    def build(self, spec: PriorSpec) -> "PixelSNAIL":
        """Build the network for the code maps of `spec`, with random weights."""
        return PixelSNAIL(self, spec)


class PixelSNAIL(Prior):
    """PixelSNAIL prior. See `Prior` for inputs and outputs.

    >>> from vqvae2.code_maps import MapSpec
    >>> bottom, top = (MapSpec(codebook_size=512, height=side, width=side) for side in (8, 4))
    >>> config = PixelSNAILConfig(channels=8, residual_channels=8, blocks=1, layers=1, heads=2)
    >>> prior = config.build(PriorSpec(level=bottom, coarser=(top,), num_classes=10))
    >>> codes = torch.zeros(2, 8, 8, dtype=torch.int64)
    >>> top_codes = torch.zeros(2, 4, 4, dtype=torch.int64)
    >>> prior(codes, (top_codes,), torch.tensor([3, 7])).shape  # logits (B, K, H, W)
    torch.Size([2, 512, 8, 8])
    """

    def __init__(self, config: PixelSNAILConfig, spec: PriorSpec) -> None:
        super().__init__(spec)
        self.config = config
        channels, dropout = config.channels, config.dropout
        self.conditioner = Conditioner.if_needed(spec, channels, config.kernel, config.condition_layers, config.dropout)
        self.embedding = nn.Embedding(spec.level.codebook_size, channels)
        self.first = CausalConv2d(channels, channels, config.kernel, include_current=False)
        self.coordinates = PointwiseConv2d(2, channels)
        self.blocks = nn.ModuleList(
            PixelSNAILBlock(config, index in config.attention_blocks, conditioned=self.conditioner is not None)
            for index in range(config.blocks)
        )
        self.output = nn.ModuleList(
            GatedResidualBlock(channels, config.residual_channels, 1, dropout=dropout)
            for _ in range(config.output_layers)
        )
        self.logits = PointwiseConv2d(channels, spec.level.codebook_size)

    def conditional_logits(
        self, codes: Int[Tensor, "b h w"], condition: Float[Tensor, "b c h2 w2"] | None
    ) -> Float[Tensor, "b k h w"]:
        x = self.first(self.embedding(codes).movedim(-1, 1))
        # In the type of the features, which autocast may have lowered; float32 would raise it again.
        coordinates = coordinate_map(codes.shape[1], codes.shape[2], codes.device).to(x.dtype)
        coordinates = coordinates.expand(len(codes), -1, -1, -1)
        x = x + self.coordinates(coordinates)
        for block in self.blocks:
            x = self._run_block(block, x, coordinates, condition)
        for layer in self.output:
            x = self._run_block(layer, x)
        return self.logits(F.elu(x))

    def _make_incremental_decoder(self, batch: int, condition: Tensor | None) -> IncrementalDecoder:
        return _IncrementalPixelSNAIL(self, batch, condition)

    @property
    def is_raster_order(self) -> bool:
        return not self.config.attention_blocks or self.config.attention_order == "raster"

    def _wavefront_shape(self, batch: int, height: int) -> WavefrontShape | None:
        width = self.spec.level.width
        if not self.is_raster_order:
            return WavefrontShape(batch, height, width, self.config.kernel // 2 + 1)
        if self.config.attention_blocks:
            return None
        skew = choose_skew((module for module in self.modules() if isinstance(module, CausalConv2d)), width)
        shape = None if skew is None else WavefrontShape(batch, height, width, skew)
        return shape if shape is not None and shape.num_steps < height * width else None

    @torch.inference_mode()
    def wavefront_decoder(
        self, batch: int, height: int, coarser: CodeMaps = (), labels: Int[Tensor, " b"] | None = None
    ) -> WavefrontDecoder | None:
        shape = self._wavefront_shape(batch, height)
        return None if shape is None else _WavefrontPixelSNAIL(self, shape, self._condition(batch, coarser, labels))


class PixelSNAILBlock(nn.Module):
    """Gated residual blocks, then attention to all earlier positions, merged by a pointwise block."""

    def __init__(self, config: PixelSNAILConfig, use_attention: bool, conditioned: bool) -> None:
        super().__init__()
        channels, dropout = config.channels, config.dropout
        self.layers = nn.ModuleList(
            GatedResidualBlock(
                channels,
                config.residual_channels,
                config.kernel,
                condition_channels=channels if conditioned else 0,
                dropout=dropout,
            )
            for _ in range(config.layers)
        )
        self.attention = self.merge = None
        if use_attention:
            skew = config.kernel // 2 + 1 if config.attention_order == "wavefront" else None
            self.attention = CausalAttention(channels, config.heads, dropout, skew)
            self.merge = GatedResidualBlock(channels, channels, 1, extra_channels=channels // 2, dropout=dropout)

    def forward(self, x: Tensor, coordinates: Tensor, condition: Tensor | None) -> Tensor:
        features = x
        for layer in self.layers:
            features = layer(features, condition=condition)
        if self.attention is not None and self.merge is not None:
            features = self.merge(features, extra=self.attention(x, features, coordinates))
        return features


class _IncrementalPixelSNAIL(IncrementalDecoder):
    def __init__(self, model: PixelSNAIL, batch: int, condition: Float[Tensor, "b c h w"] | None) -> None:
        height, width = model.spec.level.shape
        self.condition_rows = ConditionRows(condition, height)
        self.embedding = model.embedding.weight.detach()
        self.first = model.first.incremental(batch, width)
        self.coordinates = coordinate_map(height, width, self.embedding.device).to(self.embedding.dtype)
        self.coordinates = self.coordinates.permute(1, 2, 0).contiguous()
        self.row_coordinates = self.coordinates[0].clone()
        self.project_coordinates = model.coordinates.incremental()
        self.blocks = [
            _IncrementalBlock(block, batch, height, width)
            for block in model.blocks
            if isinstance(block, PixelSNAILBlock)
        ]
        self.output = [
            layer.incremental(batch, width) for layer in model.output if isinstance(layer, GatedResidualBlock)
        ]
        self.to_logits = model.logits.incremental()
        self.batch = batch

    @torch.inference_mode()
    def begin_row(self, row: int) -> None:
        self.row_coordinates.copy_(self.coordinates[row])
        condition = self.condition_rows[row]
        self.first.begin_row(row, self.project_coordinates(self.coordinates[row])[:, None])
        for block in self.blocks:
            block.begin_row(row, condition)
        for layer in self.output:
            layer.begin_row(row)

    @torch.inference_mode()
    def logits(self, column: Column) -> Float[Tensor, "b k"]:
        x = self.first.output(column)
        coordinates = self.row_coordinates[column].expand(self.batch, 2)
        for block in self.blocks:
            x = block.step(column, x, coordinates)
        for layer in self.output:
            x = layer.step(column, x)
        return self.to_logits(F.elu(x))

    @torch.inference_mode()
    def set_codes(self, column: Column, codes: Int[Tensor, " b"]) -> None:
        self.first.set_input(column, F.embedding(codes, self.embedding))


class _IncrementalBlock:
    def __init__(self, block: PixelSNAILBlock, batch: int, height: int, width: int) -> None:
        layers = (layer for layer in block.layers if isinstance(layer, GatedResidualBlock))
        self.layers = [layer.incremental(batch, width) for layer in layers]
        self.attention = block.attention.incremental(batch, height, width) if block.attention else None
        self.merge = block.merge.incremental(batch, width) if block.merge else None

    def begin_row(self, row: int, condition: Tensor | None) -> None:
        for layer in self.layers:
            layer.begin_row(row, condition)
        if self.attention is not None and self.merge is not None:
            self.attention.begin_row(row)
            self.merge.begin_row(row)

    def step(self, column: Column, x: Tensor, coordinates: Tensor) -> Tensor:
        features = x
        for layer in self.layers:
            features = layer.step(column, features)
        if self.attention is not None and self.merge is not None:
            features = self.merge.step(column, features, self.attention.step(column, x, features, coordinates))
        return features


class _WavefrontPixelSNAIL(WavefrontDecoder):
    def __init__(self, model: PixelSNAIL, shape: WavefrontShape, condition: Float[Tensor, "b c h w"] | None) -> None:
        height, width = model.spec.level.shape
        self.shape = shape
        self.embedding = model.embedding.weight.detach()
        self.first = WavefrontConv2d(model.first, shape)
        self.coordinates = coordinate_map(height, width, self.embedding.device).to(self.embedding.dtype)
        self.coordinates = self.coordinates.flatten(1).T  # (H · W, 2)
        self.projected_coordinates = model.coordinates.incremental()(self.coordinates)
        self.size, self.condition_size = (height, width), (1, 1)
        if condition is not None:
            self.condition_size = (condition.shape[2], condition.shape[3])
            condition = condition.flatten(2).permute(2, 0, 1)
        self.blocks = [
            _WavefrontBlock(block, shape, condition) for block in model.blocks if isinstance(block, PixelSNAILBlock)
        ]
        self.output = [
            WavefrontGatedResidualBlock(layer, shape) for layer in model.output if isinstance(layer, GatedResidualBlock)
        ]
        self.to_logits = model.logits.incremental()

    @torch.inference_mode()
    def logits(self, wave: Wave) -> Float[Tensor, "r b k"]:
        rows, columns = self.shape.index_tensors(wave, self.embedding.device)
        (height, width), (condition_height, condition_width) = self.size, self.condition_size
        condition_positions = rows * condition_height // height * condition_width + columns * condition_width // width
        positions = (rows * width + columns)[:, None].expand(-1, self.shape.batch).flatten()
        coordinates = self.coordinates.index_select(0, positions)
        x = self.first.output(wave, self.projected_coordinates.index_select(0, positions))
        for block in self.blocks:
            x = block.step(wave, x, condition_positions, coordinates)
        for layer in self.output:
            x = layer.step(wave, x)
        return self.to_logits(F.elu(x)).unflatten(0, (len(rows), self.shape.batch))

    @torch.inference_mode()
    def set_codes(self, wave: Wave, codes: Int[Tensor, "r b"]) -> None:
        self.first.set_input(wave, F.embedding(codes.flatten(), self.embedding))


class _WavefrontBlock:
    def __init__(self, block: PixelSNAILBlock, shape: WavefrontShape, condition: Tensor | None) -> None:
        self.layers = [
            WavefrontGatedResidualBlock(layer, shape, condition)
            for layer in block.layers
            if isinstance(layer, GatedResidualBlock)
        ]
        self.attention = WavefrontAttention(block.attention, shape) if block.attention else None
        self.merge = WavefrontGatedResidualBlock(block.merge, shape) if block.merge else None

    def step(self, wave: Wave, x: Tensor, condition_positions: Tensor, coordinates: Tensor) -> Tensor:
        features = x
        for layer in self.layers:
            features = layer.step(wave, features, condition_positions)
        if self.attention is not None and self.merge is not None:
            features = self.merge.step(wave, features, extra=self.attention.step(wave, x, features, coordinates))
        return features

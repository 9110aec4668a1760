"""PixelSNAIL (Chen et al. 2018), the prior of VQ-VAE-2: gated causal convolutions in blocks that end in attention."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from vqvae2.code_maps import CodeMaps
from vqvae2.config import Config
from vqvae2.priors.base import Column, IncrementalDecoder, Prior, PriorSpec
from vqvae2.priors.conditioning import Conditioner
from vqvae2.priors.layers import (
    CausalAttention,
    CausalConv2d,
    GatedResidual,
    Pointwise,
    coordinate_map,
)


class PixelSNAILConfig(Config):
    """The network; a level that coarser ones condition usually goes without attention, as in the paper."""

    kind: Literal["pixelsnail"] = "pixelsnail"
    channels: int = Field(default=256, ge=2, description="hidden units")
    residual_channels: int = Field(default=256, ge=1, description="hidden units of a residual block")
    kernel: int = Field(default=5, ge=3, description="rows and columns of a causal convolution, odd")
    blocks: int = Field(default=4, ge=1)
    layers: int = Field(default=4, ge=1, description="residual blocks in each block")
    attention: bool | tuple[int, ...] = Field(
        default=True, description="which blocks end in attention: all, none, or a list"
    )
    heads: int = Field(default=8, ge=1)
    condition_layers: int = Field(default=3, ge=0, description="residual blocks over the coarser levels' codes")
    output_layers: int = Field(default=0, ge=0, description="pointwise residual blocks before the logits")
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> "PixelSNAILConfig":
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {self.kernel}")
        if self.attending and (self.channels // 2) % self.heads:
            raise ValueError(f"half the channels ({self.channels // 2}) must divide by heads ({self.heads})")
        wrong = [block for block in self.attending if not 0 <= block < self.blocks]
        if wrong:
            raise ValueError(f"attention names block {wrong[0]}, but blocks are numbered 0 to {self.blocks - 1}")
        return self

    @property
    def attending(self) -> frozenset[int]:
        """Numbers of the blocks that end in attention."""
        if isinstance(self.attention, bool):
            return frozenset(range(self.blocks) if self.attention else ())
        return frozenset(self.attention)

    def build(self, spec: PriorSpec) -> "PixelSNAIL":
        """The network for code maps as in `spec`, with random weights."""
        return PixelSNAIL(self, spec)


class PixelSNAIL(Prior):
    """See `Prior` for what goes in and comes out."""

    def __init__(self, config: PixelSNAILConfig, spec: PriorSpec) -> None:
        super().__init__(spec)
        self.config = config
        channels, dropout = config.channels, config.dropout
        self.conditioner = Conditioner.if_needed(spec, channels, config.kernel, config.condition_layers, config.dropout)
        self.embedding = nn.Embedding(spec.level.codebook_size, channels)
        self.first = CausalConv2d(channels, channels, config.kernel, strict=True)
        self.coordinates = Pointwise(2, channels)
        self.blocks = nn.ModuleList(
            Block(config, attends=index in config.attending, conditioned=self.conditioner is not None)
            for index in range(config.blocks)
        )
        self.output = nn.ModuleList(
            GatedResidual(channels, config.residual_channels, 1, dropout=dropout) for _ in range(config.output_layers)
        )
        self.logits = Pointwise(channels, spec.level.codebook_size)

    def forward(
        self, codes: Int[Tensor, "b h w"], coarser: CodeMaps = (), labels: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b k h w"]:
        self._check_coarser(coarser)
        batch, height, width = codes.shape
        condition = self.conditioner(batch, coarser, labels) if self.conditioner else None
        coordinates = coordinate_map(height, width, codes.device).expand(batch, -1, -1, -1)
        x = self.first(self.embedding(codes).movedim(-1, 1)) + self.coordinates(coordinates)
        for block in self.blocks:
            x = self._run(block, x, coordinates, condition)
        for layer in self.output:
            x = self._run(layer, x)
        return self.logits(F.elu(x))

    @torch.inference_mode()
    def incremental_decoder(
        self, batch: int, coarser: CodeMaps = (), labels: Int[Tensor, " b"] | None = None
    ) -> IncrementalDecoder:
        self._check_coarser(coarser)
        condition = self.conditioner(batch, coarser, labels) if self.conditioner else None
        return _IncrementalPixelSNAIL(self, batch, condition)


class Block(nn.Module):
    """Residual blocks, then attention over everything earlier, merged by a pointwise block."""

    def __init__(self, config: PixelSNAILConfig, attends: bool, conditioned: bool) -> None:
        super().__init__()
        channels, dropout = config.channels, config.dropout
        condition = channels if conditioned else 0
        self.layers = nn.ModuleList(
            GatedResidual(channels, config.residual_channels, config.kernel, condition=condition, dropout=dropout)
            for _ in range(config.layers)
        )
        self.attention = CausalAttention(channels, config.heads, dropout) if attends else None
        self.merge = GatedResidual(channels, channels, 1, extra=channels // 2, dropout=dropout) if attends else None

    def forward(self, x: Tensor, coordinates: Tensor, condition: Tensor | None) -> Tensor:
        features = x
        for layer in self.layers:
            features = layer(features, condition=condition)
        if self.attention is not None and self.merge is not None:
            features = self.merge(features, extra=self.attention(x, features, coordinates))
        return features


class _IncrementalPixelSNAIL(IncrementalDecoder):
    def __init__(self, model: PixelSNAIL, batch: int, condition: Float[Tensor, "b c h w"] | None) -> None:
        height, width = model.spec.level.height, model.spec.level.width
        # Rows of the condition as (h, w, B, C): a row of it is then what the walks take.
        self.condition = None if condition is None else condition.permute(2, 3, 0, 1).contiguous()
        self.height = height
        self.embedding = model.embedding.weight.detach()
        self.first = model.first.incremental(batch, width)
        self.coordinates = coordinate_map(height, width, self.embedding.device).permute(1, 2, 0).contiguous()
        self.row_coordinates = self.coordinates[0].clone()
        self.from_coordinates = model.coordinates.incremental()
        self.blocks = [
            _IncrementalBlock(block, batch, height, width) for block in model.blocks if isinstance(block, Block)
        ]
        self.output = [layer.incremental(batch, width) for layer in model.output if isinstance(layer, GatedResidual)]
        self.to_logits = model.logits.incremental()
        self.batch = batch

    @torch.inference_mode()
    def begin_row(self, row: int) -> None:
        self.row_coordinates.copy_(self.coordinates[row])
        condition = None if self.condition is None else self.condition[row * len(self.condition) // self.height]
        self.first.begin_row(row, self.from_coordinates(self.coordinates[row])[:, None])
        for block in self.blocks:
            block.begin_row(row, condition)
        for layer in self.output:
            layer.begin_row(row)

    @torch.inference_mode()
    def logits(self, column: Column) -> Float[Tensor, "b k"]:
        x = self.first.at(column)
        coordinates = self.row_coordinates[column].expand(self.batch, 2)
        for block in self.blocks:
            x = block.at(column, x, coordinates)
        for layer in self.output:
            x = layer.at(column, x)
        return self.to_logits(F.elu(x))

    @torch.inference_mode()
    def set_codes(self, column: Column, codes: Int[Tensor, " b"]) -> None:
        self.first.put(column, F.embedding(codes, self.embedding))


class _IncrementalBlock:
    def __init__(self, block: Block, batch: int, height: int, width: int) -> None:
        self.layers = [layer.incremental(batch, width) for layer in block.layers if isinstance(layer, GatedResidual)]
        self.attention = block.attention.incremental(batch, height, width) if block.attention else None
        self.merge = block.merge.incremental(batch, width) if block.merge else None

    def begin_row(self, row: int, condition: Tensor | None) -> None:
        for layer in self.layers:
            layer.begin_row(row, condition)
        if self.attention is not None and self.merge is not None:
            self.attention.begin_row(row)
            self.merge.begin_row(row)

    def at(self, column: Column, x: Tensor, coordinates: Tensor) -> Tensor:
        features = x
        for layer in self.layers:
            features = layer.at(column, features)
        if self.attention is not None and self.merge is not None:
            features = self.merge.at(column, features, self.attention.at(column, x, features, coordinates))
        return features

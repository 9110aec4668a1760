"""Causal self-attention over positions in raster or wavefront order, with a key-value cache for sampling."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vqvae2.priors.base import Column, Wave, WavefrontShape
from vqvae2.priors.layers import GatedResidualBlock, PointwiseConv2d
from vqvae2.priors.wavefront import WavefrontGatedResidualBlock


class CausalAttention(nn.Module):
    """Multi-head attention to all positions up to and including the current one (Chen et al. 2018).

    Keys and values are computed from the block's input, its features and the coordinates; queries from the features and
    the coordinates. Including the current position is causal, because the network's first layer excludes it.

    With a skew, positions are in wavefront order instead of raster order: a position (row r, column c) attends to all
    (r', c') with c' + skew · r' ≤ c + skew · r. Those of the same wavefront step are included, because their features
    depend on codes of earlier steps only.
    """

    def __init__(self, channels: int, heads: int, dropout: float, skew: int | None = None) -> None:
        super().__init__()
        self.heads, self.width, self.skew = heads, channels // 2, skew
        key_channels, query_channels = 2 * channels + 2, channels + 2
        self.key_block = GatedResidualBlock(key_channels, channels, 1, dropout=dropout)
        self.query_block = GatedResidualBlock(query_channels, channels, 1, dropout=dropout)
        self.key_value = PointwiseConv2d(key_channels, 2 * self.width)
        self.query = PointwiseConv2d(query_channels, self.width)

    def forward(self, inputs: Tensor, features: Tensor, coordinates: Float[Tensor, "b 2 h w"]) -> Tensor:
        key, value = self.key_value(self.key_block(torch.cat([inputs, features, coordinates], 1))).chunk(2, 1)
        query = self.query(self.query_block(torch.cat([features, coordinates], 1)))
        height, width = query.shape[2:]
        query, key, value = (self._split_heads(x) for x in (query, key, value))
        if self.skew is None:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            mask = wavefront_mask(height, width, self.skew, query.device)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attended.transpose(2, 3).reshape(len(query), self.width, height, width)

    def incremental(self, batch: int, height: int, width: int) -> "IncrementalAttention":
        """Return the incremental counterpart for a batch of maps of this size."""
        return IncrementalAttention(self, batch, height, width)

    def _split_heads(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b heads n e"]:
        # Fused kernels need contiguous inputs; without them, all N × N weights would be materialized.
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3).contiguous()


class IncrementalAttention:
    """Incremental attention with cached keys and values."""

    def __init__(self, attention: CausalAttention, batch: int, height: int, width: int) -> None:
        self.key_block = attention.key_block.incremental(batch, width)
        self.query_block = attention.query_block.incremental(batch, width)
        self.key_value, self.query = attention.key_value.incremental(), attention.query.incremental()
        self.heads = attention.heads
        self.cache = self.query.weight.new_zeros(2, batch, self.heads, height * width, attention.width // self.heads)
        self.position = RasterPosition(height, width, self.cache.device)

    def begin_row(self, row: int) -> None:
        """Start a row."""
        self.position.begin_row(row)
        self.key_block.begin_row(row)
        self.query_block.begin_row(row)

    def step(self, column: Column, inputs: Tensor, features: Tensor, coordinates: Float[Tensor, "b 2"]) -> Tensor:
        """Return the output (B, channels / 2) at a column of the current row."""
        key_inputs = torch.cat([inputs, features, coordinates], 1)
        key_value = self.key_value(self.key_block.step(column, key_inputs)).view(len(inputs), 2, self.heads, -1)
        query = self.query(self.query_block.step(column, torch.cat([features, coordinates], 1)))
        query = query.view(len(inputs), self.heads, 1, -1)
        position = self.position.at(column)
        return cached_attention(self.cache, key_value.transpose(0, 1), query, position, self.position.all).flatten(1)


class WavefrontAttention:
    """Attention of the rows in flight."""

    def __init__(self, attention: CausalAttention, shape: WavefrontShape) -> None:
        self.key_block = WavefrontGatedResidualBlock(attention.key_block, shape)
        self.query_block = WavefrontGatedResidualBlock(attention.query_block, shape)
        self.key_value, self.query = attention.key_value.incremental(), attention.query.incremental()
        self.cache = WavefrontCache(shape, attention.heads, attention.width // attention.heads, self.query.weight)

    def step(self, wave: Wave, inputs: Tensor, features: Tensor, coordinates: Float[Tensor, "rb 2"]) -> Tensor:
        """Return the outputs (rows · batch, channels / 2) of the rows in flight."""
        key_value = self.key_value(self.key_block.step(wave, torch.cat([inputs, features, coordinates], 1)))
        query = self.query(self.query_block.step(wave, torch.cat([features, coordinates], 1)))
        batch, heads, width = self.cache.sizes
        key, value = key_value.view(-1, batch, 2, heads, width).permute(2, 1, 3, 0, 4)
        attended = self.cache.attend(query.view(-1, batch, heads, width).permute(1, 2, 0, 3), key, value)
        return attended.permute(2, 0, 1, 3).reshape(len(inputs), heads * width)


class WavefrontCache:
    """Keys and values of a layer, in wavefront order, so that no mask is needed.

    Args:
        like: Tensor of the type and on the device of keys and values.
    """

    def __init__(self, shape: WavefrontShape, heads: int, head_dim: int, like: Tensor) -> None:
        self.sizes = (shape.batch, heads, head_dim)
        self.cache = like.new_zeros(2, shape.batch, heads, shape.height * shape.width, head_dim)
        self.length = 0  # cached positions

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Float[Tensor, "b heads r e"]:
        """Store keys and values (B, heads, R, E) of the rows in flight, then attend to all that are stored."""
        first, self.length = self.length, self.length + key.shape[2]
        keys, values = self.cache
        keys[:, :, first : self.length] = key
        values[:, :, first : self.length] = value
        return F.scaled_dot_product_attention(query, keys[:, :, : self.length], values[:, :, : self.length])


def wavefront_mask(height: int, width: int, skew: int, device: torch.device) -> Bool[Tensor, "n n"]:
    """Return to which positions, in raster order, each position attends: those of its own and of earlier steps."""
    rows, columns = (torch.arange(length, device=device) for length in (height, width))
    steps = (skew * rows[:, None] + columns).flatten()
    return steps[:, None] >= steps


class RasterPosition:
    """Position in raster order of the columns of the current row."""

    def __init__(self, height: int, width: int, device: torch.device) -> None:
        self.width, self.row = width, 0
        self.row_start = torch.zeros(1, dtype=torch.int64, device=device)
        self.all = torch.arange(height * width, device=device)

    def begin_row(self, row: int) -> None:
        """Start a row."""
        self.row = row
        self.row_start.fill_(row * self.width)

    def at(self, column: Column) -> Column:
        """Return the position of a column: an integer, or a tensor (1,) if the column is one."""
        return self.row_start + column if isinstance(column, Tensor) else self.row * self.width + column


def cached_attention(
    cache: Float[Tensor, "2 b heads n e"],
    key_value: Float[Tensor, "2 b heads e"],
    query: Float[Tensor, "b heads 1 e"],
    position: Column,
    positions: Int[Tensor, " n"],
) -> Float[Tensor, "b heads 1 e"]:
    """Store the key and value of `position` in the cache, then attend from it to all positions up to it."""
    if isinstance(position, Tensor):
        cache.index_copy_(3, position, key_value.unsqueeze(3))
        keys, values = cache
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=(positions <= position)[None, None, None])
    cache[:, :, :, position] = key_value
    keys, values = cache[:, :, :, : position + 1]
    return F.scaled_dot_product_attention(query, keys, values)

"""Causal self-attention over positions in raster order, with a key-value cache for sampling."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqvae2.priors.base import Column
from vqvae2.priors.layers import GatedResidualBlock, PointwiseConv2d


class CausalAttention(nn.Module):
    """Multi-head attention to all positions up to and including the current one (Chen et al. 2018).

    Keys and values are computed from the block's input, its features and the coordinates; queries from the features and
    the coordinates. Including the current position is causal, because the network's first layer excludes it.
    """

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.width = heads, channels // 2
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
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
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

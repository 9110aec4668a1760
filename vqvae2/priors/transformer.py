"""A decoder-only transformer over codes (Vaswani et al. 2017), with 2D rotary position embeddings.

Pre-norm blocks with RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) and a SwiGLU feed-forward layer (Shazeer 2020,
arXiv 2002.05202). In each attention head, half of the rotary pairs encode the row, the other half the column (Su et al.
2021, arXiv 2104.09864).

In raster order, the input at a position is the previous code, so attention includes the current position. In wavefront
order, it is the code to the left and the code above, and attention includes all positions of the same step.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from vqvae2.code_maps import CodeMaps
from vqvae2.config import Config
from vqvae2.priors.attention import RasterPosition, WavefrontCache, cached_attention, wavefront_mask
from vqvae2.priors.base import (
    Column,
    IncrementalDecoder,
    Prior,
    PriorSpec,
    Wave,
    WavefrontDecoder,
    WavefrontShape,
)
from vqvae2.priors.conditioning import Conditioner
from vqvae2.priors.layers import upsample_to

_CONDITION_KERNEL = 3
_ROTARY_BASE = 10_000.0
_SKEW = 2  # columns that a row is behind the row above it in wavefront order: the code above right is known


class TransformerConfig(Config):
    """Settings of the network."""

    kind: Literal["transformer"] = "transformer"
    channels: int = Field(default=768, ge=4, le=2**14, description="hidden channels")
    layers: int = Field(default=12, ge=1, le=1024, description="number of blocks")
    heads: int = Field(default=12, ge=1, le=1024, description="attention heads")
    feed_forward: float = Field(default=8 / 3, gt=0, description="hidden channels of the feed-forward layer / channels")
    attention_order: Literal["raster", "wavefront"] = Field(
        default="raster", description="order of positions in attention; wavefront samples many rows at once"
    )
    condition_layers: int = Field(
        default=3, ge=0, le=1024, description="residual blocks over the coarser levels' codes"
    )
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> "TransformerConfig":
        if self.channels % (4 * self.heads):
            raise ValueError(
                f"channels ({self.channels}) must be divisible by four times heads ({4 * self.heads}), "
                "so that each head has rotary pairs for rows and for columns"
            )
        return self

    def build(self, spec: PriorSpec) -> "Transformer":
        """Build the network for the code maps of `spec`, with random weights."""
        return Transformer(self, spec)


class Transformer(Prior):
    """Transformer prior. See `Prior` for inputs and outputs.

    >>> from vqvae2.code_maps import MapSpec
    >>> spec = PriorSpec(level=MapSpec(codebook_size=512, height=8, width=8))
    >>> prior = TransformerConfig(channels=16, layers=2, heads=2).build(spec)
    >>> prior(torch.zeros(2, 8, 8, dtype=torch.int64)).shape  # logits (B, K, H, W)
    torch.Size([2, 512, 8, 8])
    """

    def __init__(self, config: TransformerConfig, spec: PriorSpec) -> None:
        super().__init__(spec)
        self.config = config
        channels, level = config.channels, spec.level
        self.conditioner = Conditioner.if_needed(
            spec, channels, _CONDITION_KERNEL, config.condition_layers, config.dropout
        )
        self.embedding = nn.Embedding(level.codebook_size, channels)
        self.start = nn.Parameter(torch.zeros(channels))  # input without a code to the left, or before the first
        self.embedding_above = None if self.is_raster_order else nn.Embedding(level.codebook_size, channels)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(channels)
        self.logits = nn.Linear(channels, level.codebook_size, bias=False)
        for embedding in filter(None, (self.embedding, self.embedding_above)):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.normal_(self.start, std=0.02)
        nn.init.normal_(self.logits.weight, std=0.02)

    def conditional_logits(
        self, codes: Int[Tensor, "b h w"], condition: Float[Tensor, "b c h2 w2"] | None
    ) -> Float[Tensor, "b k h w"]:
        x = self._embed(codes)
        if condition is not None:
            x = x + self._at_positions(condition)
        rotary = self.rotary()
        mask = None if self.is_raster_order else wavefront_mask(*self.spec.level.shape, _SKEW, codes.device)
        for block in self.blocks:
            x = self._run_block(block, x, rotary, mask)
        return self.logits(self.norm(x)).transpose(1, 2).unflatten(2, codes.shape[1:])

    @property
    def is_raster_order(self) -> bool:
        return self.config.attention_order == "raster"

    def rotary(self) -> Float[Tensor, "2 n e"]:
        """Return the rotary embedding of all positions."""
        level, device = self.spec.level, self.start.device
        return rotary_embedding(level.height, level.width, self.config.channels // self.config.heads, device)

    def _make_incremental_decoder(self, batch: int, condition: Tensor | None) -> IncrementalDecoder:
        at_positions = None if condition is None else self._at_positions(condition)
        return _IncrementalTransformer(self, batch, at_positions)

    @torch.inference_mode()
    def wavefront_decoder(
        self, batch: int, height: int, coarser: CodeMaps = (), labels: Int[Tensor, " b"] | None = None
    ) -> WavefrontDecoder | None:
        if self.is_raster_order:
            return None
        condition = self._condition(batch, coarser, labels)
        shape = WavefrontShape(batch, height, self.spec.level.width, _SKEW)
        return _WavefrontTransformer(self, shape, None if condition is None else self._at_positions(condition))

    def _embed(self, codes: Int[Tensor, "b h w"]) -> Float[Tensor, "b n c"]:
        """Return the inputs of all positions."""
        if self.embedding_above is None:
            previous = self.embedding(codes.flatten(1)[:, :-1])
            return torch.cat([self.start.to(previous.dtype).expand(len(codes), 1, -1), previous], 1)
        left = self.embedding(codes[:, :, :-1])
        left = torch.cat([self.start.to(left.dtype).expand(*codes.shape[:2], 1, -1), left], 2)
        above = F.pad(self.embedding_above(codes[:, :-1]), (0, 0, 0, 0, 1, 0))
        return (left + above).flatten(1, 2)

    def _at_positions(self, condition: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
        """Return the conditioning features of each position. N is 1 if there is only a label."""
        return upsample_to(condition, *self.spec.level.shape).flatten(2).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Causal attention and a gated feed-forward layer, with residual connections, on (B, N, C)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        channels, hidden = config.channels, round(config.feed_forward * config.channels)
        self.heads = config.heads
        self.first_norm, self.second_norm = nn.RMSNorm(channels), nn.RMSNorm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        self.gate_up_proj = nn.Linear(channels, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, channels, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        for layer in (self.out, self.down_proj):  # residual branches start small, whatever the number of blocks
            nn.init.normal_(layer.weight, std=0.02 / (2 * config.layers) ** 0.5)

    def forward(
        self, x: Float[Tensor, "b n c"], rotary: Float[Tensor, "2 n e"], mask: Bool[Tensor, "n n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        """Return the outputs. Without a mask, positions attend to those up to and including themselves."""
        query, key, value = self.project(x, rotary)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return self.feed_forward(x, attended)

    def project(self, x: Float[Tensor, "b n c"], rotary: Float[Tensor, "2 n e"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, heads, N, C / heads)."""
        split = self.query_key_value(self.first_norm(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        return apply_rotary(query, rotary), apply_rotary(key, rotary), value

    def feed_forward(self, x: Float[Tensor, "b n c"], attended: Float[Tensor, "b heads n e"]) -> Float[Tensor, "b n c"]:
        """Add the attention output to `x`, then apply the feed-forward layer."""
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        value, gate = self.gate_up_proj(self.second_norm(x)).chunk(2, 2)
        return x + self.dropout(self.down_proj(value * F.silu(gate)))


def rotary_embedding(height: int, width: int, head_dim: int, device: torch.device) -> Float[Tensor, "2 n head_dim"]:
    """Return cosines and sines of the rotation angles at each position in raster order."""
    frequencies = _ROTARY_BASE ** -(torch.arange(head_dim // 4, device=device) / (head_dim // 4))
    rows = torch.arange(height, device=device).repeat_interleave(width)[:, None] * frequencies
    columns = torch.arange(width, device=device).repeat(height)[:, None] * frequencies
    angles = torch.cat([rows, columns], 1).repeat(1, 2)  # elements i and i + head_dim / 2 are a pair
    return torch.stack([angles.cos(), angles.sin()])


def apply_rotary(x: Float[Tensor, "b heads n e"], rotary: Float[Tensor, "2 n e"]) -> Float[Tensor, "b heads n e"]:
    """Rotate each pair of elements by the angle of its position."""
    cosine, sine = rotary.to(x.dtype)
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


class _IncrementalTransformer(IncrementalDecoder):
    def __init__(self, model: Transformer, batch: int, condition: Float[Tensor, "b n c"] | None) -> None:
        level, config = model.spec.level, model.config
        self.model, self.condition = model, condition
        self.blocks = [block for block in model.blocks if isinstance(block, TransformerBlock)]
        shape = (len(self.blocks), 2, batch, config.heads, level.num_codes, config.channels // config.heads)
        self.cache = model.start.detach().new_zeros(shape)
        self.previous = model.start.detach().new_zeros(batch, 1, config.channels)
        self.rotary = model.rotary()
        self.position = RasterPosition(level.height, level.width, self.previous.device)

    @torch.inference_mode()
    def begin_row(self, row: int) -> None:
        self.position.begin_row(row)
        if row == 0:
            self.previous.copy_(self.model.start.expand_as(self.previous))

    @torch.inference_mode()
    def logits(self, column: Column) -> Float[Tensor, "b k"]:
        position = self.position.at(column)
        x = self.previous
        if self.condition is not None:
            label_only = self.condition.shape[1] == 1
            x = x + self.condition[:, 0 if label_only else position].view(*x.shape)
        rotary = self.rotary[:, position].view(2, 1, -1)
        for block, cache in zip(self.blocks, self.cache, strict=True):
            query, key, value = block.project(x, rotary)
            key_value = torch.stack([key, value])[:, :, :, 0]
            x = block.feed_forward(x, cached_attention(cache, key_value, query, position, self.position.all))
        return self.model.logits(self.model.norm(x))[:, 0]

    @torch.inference_mode()
    def set_codes(self, column: Column, codes: Int[Tensor, " b"]) -> None:
        self.previous.copy_(self.model.embedding(codes)[:, None])


class _WavefrontTransformer(WavefrontDecoder):
    def __init__(self, model: Transformer, shape: WavefrontShape, condition: Float[Tensor, "b n c"] | None) -> None:
        self.model, self.shape, self.condition = model, shape, condition
        self.blocks = [block for block in model.blocks if isinstance(block, TransformerBlock)]
        head_dim = model.config.channels // model.config.heads
        self.caches = [WavefrontCache(shape, model.config.heads, head_dim, model.start.detach()) for _ in self.blocks]
        device = model.start.device
        self.codes = torch.zeros(shape.batch, shape.height, shape.width, dtype=torch.int64, device=device)
        self.rotary = model.rotary()

    @torch.inference_mode()
    def logits(self, wave: Wave) -> Float[Tensor, "r b k"]:
        rows, columns = self.shape.index_tensors(wave, self.codes.device)
        positions = rows * self.shape.width + columns
        x = self._embed(rows, columns)
        if self.condition is not None:
            label_only = self.condition.shape[1] == 1
            x = x + (self.condition if label_only else self.condition[:, positions])
        rotary = self.rotary[:, positions]
        for block, cache in zip(self.blocks, self.caches, strict=True):
            x = block.feed_forward(x, cache.attend(*block.project(x, rotary)))
        return self.model.logits(self.model.norm(x)).transpose(0, 1)

    @torch.inference_mode()
    def set_codes(self, wave: Wave, codes: Int[Tensor, "r b"]) -> None:
        rows, columns = self.shape.index_tensors(wave, self.codes.device)
        self.codes[:, rows, columns] = codes.T

    def _embed(self, rows: Int[Tensor, " r"], columns: Int[Tensor, " r"]) -> Float[Tensor, "b r c"]:
        """Return the inputs of the rows in flight."""
        assert self.model.embedding_above is not None
        left = self.model.embedding(self.codes[:, rows, columns - 1])  # of the last column at the first one, not used
        left = torch.where((columns > 0)[:, None], left, self.model.start)
        above = self.model.embedding_above(self.codes[:, rows - 1, columns])
        return left + above * (rows > 0)[:, None]

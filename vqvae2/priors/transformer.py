"""A decoder-only transformer over codes in raster order (Vaswani et al. 2017), with 2D rotary position embeddings.

Pre-norm blocks with RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) and a SwiGLU feed-forward layer (Shazeer 2020,
arXiv 2002.05202). In each attention head, half of the rotary pairs encode the row, the other half the column (Su et al.
2021, arXiv 2104.09864). The input at a position is the previous code, so attention includes the current position.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from vqvae2.config import Config
from vqvae2.priors.attention import RasterPosition, cached_attention
from vqvae2.priors.base import Column, IncrementalDecoder, Prior, PriorSpec
from vqvae2.priors.conditioning import Conditioner
from vqvae2.priors.layers import upsample_to

_CONDITION_KERNEL = 3
_ROTARY_BASE = 10_000.0


class TransformerConfig(Config):
    """Settings of the network."""

    kind: Literal["transformer"] = "transformer"
    channels: int = Field(default=768, ge=4, le=2**14, description="hidden channels")
    layers: int = Field(default=12, ge=1, le=1024, description="number of blocks")
    heads: int = Field(default=12, ge=1, le=1024, description="attention heads")
    feed_forward: float = Field(default=8 / 3, gt=0, description="hidden channels of the feed-forward layer / channels")
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
        self.start = nn.Parameter(torch.zeros(channels))  # input at the first position
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(channels)
        self.logits = nn.Linear(channels, level.codebook_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.start, std=0.02)
        nn.init.normal_(self.logits.weight, std=0.02)

    def conditional_logits(
        self, codes: Int[Tensor, "b h w"], condition: Float[Tensor, "b c h2 w2"] | None
    ) -> Float[Tensor, "b k h w"]:
        previous = self.embedding(codes.flatten(1)[:, :-1])
        x = torch.cat([self.start.to(previous.dtype).expand(len(codes), 1, -1), previous], 1)
        if condition is not None:
            x = x + self._at_positions(condition)
        rotary = self.rotary()
        for block in self.blocks:
            x = self._run_block(block, x, rotary)
        return self.logits(self.norm(x)).transpose(1, 2).unflatten(2, codes.shape[1:])

    def rotary(self) -> Float[Tensor, "2 n e"]:
        """Return the rotary embedding of all positions."""
        level, device = self.spec.level, self.start.device
        return rotary_embedding(level.height, level.width, self.config.channels // self.config.heads, device)

    def _make_incremental_decoder(self, batch: int, condition: Tensor | None) -> IncrementalDecoder:
        at_positions = None if condition is None else self._at_positions(condition)
        return _IncrementalTransformer(self, batch, at_positions)

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

    def forward(self, x: Float[Tensor, "b n c"], rotary: Float[Tensor, "2 n e"]) -> Float[Tensor, "b n c"]:
        query, key, value = self.project(x)
        query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        return self.feed_forward(x, F.scaled_dot_product_attention(query, key, value, is_causal=True))

    def project(self, x: Float[Tensor, "b n c"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, heads, N, C / heads), before the rotary embedding."""
        split = self.query_key_value(self.first_norm(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        return query, key, value

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
            query, key, value = block.project(x)
            key_value = torch.stack([apply_rotary(key, rotary), value])[:, :, :, 0]
            query = apply_rotary(query, rotary)
            x = block.feed_forward(x, cached_attention(cache, key_value, query, position, self.position.all))
        return self.model.logits(self.model.norm(x))[:, 0]

    @torch.inference_mode()
    def set_codes(self, column: Column, codes: Int[Tensor, " b"]) -> None:
        self.previous.copy_(self.model.embedding(codes)[:, None])

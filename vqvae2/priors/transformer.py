"""A transformer over the raster sequence of codes (Vaswani et al. 2017), with rotary positions of rows and columns.

Pre-norm blocks with RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467) and a gated feed-forward layer (Shazeer 2020,
arXiv 2002.05202). Half of each head's pairs turn with the row, half with the column (Su et al. 2021, arXiv 2104.09864).
The input of a position is the code before it, so attention may include the position itself.
"""

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
from vqvae2.priors.layers import attend, upsample_to

_CONDITION_KERNEL = 3
_LONGEST_WAVE = 10_000.0  # radians per position fall from 1 to nearly this fraction of it


class TransformerConfig(Config):
    """The network."""

    kind: Literal["transformer"] = "transformer"
    channels: int = Field(default=768, ge=4, description="hidden units")
    layers: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    feed_forward: float = Field(default=8 / 3, gt=0, description="hidden units of the feed-forward layer, in channels")
    condition_layers: int = Field(default=3, ge=0, description="residual blocks over the coarser levels' codes")
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> "TransformerConfig":
        if self.channels % (4 * self.heads):
            raise ValueError(
                f"channels ({self.channels}) must divide by four times heads ({4 * self.heads}): "
                "a head turns pairs by rows and pairs by columns"
            )
        return self

    def build(self, spec: PriorSpec) -> "Transformer":
        """The network for code maps as in `spec`, with random weights."""
        return Transformer(self, spec)


class Transformer(Prior):
    """See `Prior` for what goes in and comes out."""

    def __init__(self, config: TransformerConfig, spec: PriorSpec) -> None:
        super().__init__(spec)
        self.config = config
        channels, level = config.channels, spec.level
        self.conditioner = Conditioner.if_needed(
            spec, channels, _CONDITION_KERNEL, config.condition_layers, config.dropout
        )
        self.embedding = nn.Embedding(level.codebook_size, channels)
        self.start = nn.Parameter(torch.zeros(channels))  # in place of a code before the first one
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(channels)
        self.logits = nn.Linear(channels, level.codebook_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.start, std=0.02)
        nn.init.normal_(self.logits.weight, std=0.02)

    def forward(
        self, codes: Int[Tensor, "b h w"], coarser: CodeMaps = (), labels: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b k h w"]:
        self._check_coarser(coarser)
        batch, height, width = codes.shape
        before = self.embedding(codes.flatten(1)[:, :-1])
        x = torch.cat([self.start.to(before.dtype).expand(batch, 1, -1), before], 1)
        condition = self._condition(batch, coarser, labels)
        if condition is not None:
            x = x + condition
        turns = self.turns()
        for block in self.blocks:
            x = self._run(block, x, turns)
        return self.logits(self.norm(x)).transpose(1, 2).unflatten(2, (height, width))

    @torch.inference_mode()
    def incremental_decoder(
        self, batch: int, coarser: CodeMaps = (), labels: Int[Tensor, " b"] | None = None
    ) -> IncrementalDecoder:
        self._check_coarser(coarser)
        return _IncrementalTransformer(self, batch, self._condition(batch, coarser, labels))

    def turns(self) -> Float[Tensor, "2 n e"]:
        """How the numbers of a head turn at each position."""
        level, device = self.spec.level, self.start.device
        return rotary_turns(level.height, level.width, self.config.channels // self.config.heads, device)

    def _condition(
        self, batch: int, coarser: CodeMaps, labels: Int[Tensor, " b"] | None
    ) -> Float[Tensor, "b n c"] | None:
        """The conditioning features under each position; n is 1 where the label is all there is."""
        if self.conditioner is None:
            return None
        return upsample_to(self.conditioner(batch, coarser, labels), *self.spec.level.shape).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Causal attention, then a gated feed-forward layer, each added to its input; (B, N, C) to the same shape."""

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
        for layer in (self.out, self.down_proj):  # blocks add little at first, however many there are
            nn.init.normal_(layer.weight, std=0.02 / (2 * config.layers) ** 0.5)

    def forward(self, x: Float[Tensor, "b n c"], turns: Float[Tensor, "2 n e"]) -> Float[Tensor, "b n c"]:
        query, key, value = self.project(x)
        attended = F.scaled_dot_product_attention(turn(query, turns), turn(key, turns), value, is_causal=True)
        return self.finish(x, attended)

    def project(self, x: Float[Tensor, "b n c"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, heads, N, C / heads); queries and keys are not turned yet."""
        split = self.query_key_value(self.first_norm(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        return query, key, value

    def finish(self, x: Float[Tensor, "b n c"], attended: Float[Tensor, "b heads n e"]) -> Float[Tensor, "b n c"]:
        """Everything after attention."""
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        value, gate = self.gate_up_proj(self.second_norm(x)).chunk(2, 2)
        return x + self.dropout(self.down_proj(value * F.silu(gate)))


def rotary_turns(height: int, width: int, size: int, device: torch.device) -> Float[Tensor, "2 n size"]:
    """Cosine and sine by which the `size` numbers of a head turn at each position, in raster order."""
    rates = _LONGEST_WAVE ** -(torch.arange(size // 4, device=device) / (size // 4))
    rows = torch.arange(height, device=device).repeat_interleave(width)[:, None] * rates
    columns = torch.arange(width, device=device).repeat(height)[:, None] * rates
    angles = torch.cat([rows, columns], 1).repeat(1, 2)  # number i and number i + size / 2 are a pair
    return torch.stack([angles.cos(), angles.sin()])


def turn(x: Float[Tensor, "b heads n e"], turns: Float[Tensor, "2 n e"]) -> Float[Tensor, "b heads n e"]:
    """Rotate each pair of numbers by the angle of its position."""
    cosine, sine = turns.to(x.dtype)
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


class _IncrementalTransformer(IncrementalDecoder):
    def __init__(self, model: Transformer, batch: int, condition: Float[Tensor, "b n c"] | None) -> None:
        level, config = model.spec.level, model.config
        self.model, self.condition, self.width = model, condition, level.width
        self.blocks = [block for block in model.blocks if isinstance(block, Block)]
        cache = (len(self.blocks), 2, batch, config.heads, level.num_codes, config.channels // config.heads)
        self.cache = model.start.detach().new_zeros(cache)
        self.before = model.start.detach().new_zeros(batch, 1, config.channels)
        self.turns, self.row = model.turns(), 0
        self.start = torch.zeros(1, dtype=torch.int64, device=self.before.device)  # position of the row's first column
        self.positions = torch.arange(level.num_codes, device=self.before.device)

    @torch.inference_mode()
    def begin_row(self, row: int) -> None:
        self.row = row  # nothing else is shared along a row: every position attends on its own
        self.start.fill_(row * self.width)
        if row == 0:
            self.before.copy_(self.model.start.expand_as(self.before))

    @torch.inference_mode()
    def logits(self, column: Column) -> Float[Tensor, "b k"]:
        position = self.start + column if isinstance(column, Tensor) else self.row * self.width + column
        x = self.before
        if self.condition is not None:
            everywhere = self.condition.shape[1] == 1  # a label alone
            x = x + self.condition[:, 0 if everywhere else position].view(*x.shape)
        turns = self.turns[:, position].view(2, 1, -1)
        for block, cache in zip(self.blocks, self.cache, strict=True):
            query, key, value = block.project(x)
            key_value = torch.stack([turn(key, turns), value])[:, :, :, 0]
            x = block.finish(x, attend(cache, key_value, turn(query, turns), position, self.positions))
        return self.model.logits(self.model.norm(x))[:, 0]

    @torch.inference_mode()
    def set_codes(self, column: Column, codes: Int[Tensor, " b"]) -> None:
        self.before.copy_(self.model.embedding(codes)[:, None])

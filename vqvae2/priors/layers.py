"""Causal layers, each with its two paths: `forward` over whole maps, and a twin that walks position by position.

Maps are (B, C, H, W). What finished rows contribute to a causal convolution is evaluated once a row for all columns
(`rows.py`); a position then costs only the few taps on its own row, read as a view of the buffer that holds it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from vqvae2.priors import toom_cook
from vqvae2.priors.base import Column
from vqvae2.priors.toom_cook import IncrementalRowConv


class CausalConv2d(nn.Module):
    """A convolution that sees `kernel` − 1 rows above, `kernel` columns wide, and what lies to the left on its row.

    `strict` leaves out the position itself, as the first layer must; `rows_above` can be fewer, none for a convolution
    along the row. Only taps that are used have weights, in raster order: 23 for kernel 5, or 22 when strict.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, strict: bool = False, rows_above: int | None = None
    ) -> None:
        super().__init__()
        self.kernel, self.padding = kernel, kernel // 2
        self.rows_above = kernel - 1 if rows_above is None else rows_above
        self.above = self.rows_above * kernel  # taps on finished rows
        self.current = kernel // 2 + (0 if strict else 1)  # taps on the current row
        self.weight = nn.Parameter(torch.empty(outputs, inputs, self.above + self.current))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        weight_norm(self, "weight")

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        weight = self.weight  # made anew, from its norms and directions, each time it is asked for
        above = self.taps_above(weight)
        if self.above and toom_cook.tiled(above, x.shape[3]) and not torch.is_autocast_enabled(x.device.type):
            finished = F.pad(x, (self.padding, self.padding, self.rows_above, -1))
            current = F.conv2d(F.pad(x, (self.padding, 0)), weight[:, :, None, self.above :], self.bias)
            return current[..., : x.shape[3]] + toom_cook.conv2d(finished, above)
        count = self.rows_above + 1
        unused = count * self.kernel - weight.shape[2]  # the last taps in raster order
        weight = F.pad(weight, (0, unused)).unflatten(2, (count, self.kernel))
        x = F.pad(x, (self.padding, self.padding, self.rows_above, 0))
        return F.conv2d(x, weight, self.bias)

    def incremental(self, batch: int, width: int) -> "IncrementalConv2d":
        """The incremental twin for a batch of maps of this width."""
        return IncrementalConv2d(self, batch, width)

    def taps_above(self, weight: Tensor) -> Float[Tensor, "o i r k"]:
        """The taps on finished rows."""
        return weight[:, :, : self.above].unflatten(2, (self.rows_above, self.kernel))


class IncrementalConv2d:
    """One causal convolution, position by position: `begin_row`, then for each column `put` its input and `at` it."""

    def __init__(self, conv: CausalConv2d, batch: int, width: int) -> None:
        weight = conv.weight.detach()  # weight norm folded
        outputs, inputs, _ = weight.shape
        self.above = IncrementalRowConv(conv.taps_above(weight), batch, width) if conv.above else None
        # (O, taps · I): the order of a flattened window
        self.current = weight[:, :, conv.above :].transpose(1, 2).reshape(outputs, -1).contiguous()
        self.bias = conv.bias.detach()[:, None]
        self.row = weight.new_zeros(batch, width + conv.padding, inputs)  # the current one
        # Batch last: for a few columns a processor multiplies weights from the left half as fast again.
        self.prepared = weight.new_zeros(width, outputs, batch)
        self.slots = [self.row[:, conv.padding + column] for column in range(width)]
        self.windows = [self.row[:, column : column + conv.current].flatten(1).T for column in range(width)]
        self.padding = conv.padding
        self.reach = torch.arange(conv.current, device=weight.device)

    def begin_row(self, row: int, extra: Float[Tensor, "w b o"] | None = None) -> None:
        """Evaluate the taps on finished rows for every column; `extra` (W or 1, B, O) is added to the result."""
        if self.above is not None and row > 0:
            self.above.push(self.row[:, self.padding :])
            torch.add(self.above.contribution(), self.bias, out=self.prepared)
        else:
            self.prepared.copy_(self.bias)
        if extra is not None:
            self.prepared += extra.transpose(1, 2)

    def put(self, column: Column, values: Float[Tensor, "b i"]) -> None:
        """Set the convolution's input at this column of the current row."""
        if isinstance(column, Tensor):
            self.row.index_copy_(1, column + self.padding, values[:, None])
        else:
            self.slots[column].copy_(values)

    def at(self, column: Column) -> Float[Tensor, "b o"]:
        """The convolution's output at this column."""
        if isinstance(column, Tensor):
            window = self.row.index_select(1, column + self.reach).flatten(1)
            return torch.addmm(self.prepared.index_select(0, column)[0], self.current, window.T).T
        return torch.addmm(self.prepared[column], self.current, self.windows[column]).T


class Pointwise(nn.Module):
    """A weight-normalised 1×1 convolution."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=bias)
        weight_norm(self.conv, "weight")

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        return self.conv(x)

    def incremental(self) -> "IncrementalPointwise":
        """The incremental twin."""
        return IncrementalPointwise(self.conv)


class IncrementalPointwise:
    """A 1×1 convolution of vectors (…, inputs)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.weight = conv.weight.detach().flatten(1).contiguous()
        self.bias = None if conv.bias is None else conv.bias.detach()

    def __call__(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        return F.linear(x, self.weight, self.bias)


class GatedResidual(nn.Module):
    """x + gate(conv(ELU(conv(ELU(x)) + extra)) + condition), the block of PixelSNAIL (Chen et al. 2018).

    `kernel` 1 makes it pointwise. `extra` is a second input of that many channels; `condition` the channels of a map
    that is the same size or smaller by a whole factor: it is projected at its own size, then repeated.
    """

    def __init__(
        self, channels: int, hidden: int, kernel: int, extra: int = 0, condition: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.first = CausalConv2d(channels, hidden, kernel)
        self.second = CausalConv2d(hidden, 2 * channels, kernel)
        self.extra = Pointwise(extra, hidden) if extra else None
        self.condition = Pointwise(condition, 2 * channels, bias=False) if condition else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, extra: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        hidden = self.first(F.elu(x))
        if self.extra is not None and extra is not None:
            hidden = hidden + self.extra(F.elu(extra))
        gates = self.second(self.dropout(F.elu(hidden)))
        if self.condition is not None and condition is not None:
            gates = gates + upsample_to(self.condition(condition), gates.shape[2], gates.shape[3])
        return x + glu(gates)

    def incremental(self, batch: int, width: int) -> "IncrementalGatedResidual":
        """The incremental twin."""
        return IncrementalGatedResidual(self, batch, width)


def glu(gates: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b c h w"]:
    """F.glu(gates, 1); on a processor its gradient keeps the memory order of the gates, which convolutions want."""
    return _GLU.apply(gates) if gates.device.type == "cpu" else F.glu(gates, 1)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor) -> Tensor:
        ctx.save_for_backward(gates)
        value, gate = gates.chunk(2, 1)
        return gate.sigmoid().mul_(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gates,) = ctx.saved_tensors
        result = torch.empty_like(gates)
        for_value, for_gate = result.chunk(2, 1)
        value, gate = gates.chunk(2, 1)
        opened = gate.sigmoid()
        torch.mul(gradients[0], opened, out=for_value)
        torch.mul(gradients[0], value, out=for_gate)
        for_gate.mul_(opened.mul_(1 - opened))
        return result


class IncrementalGatedResidual:
    """A gated residual block, position by position."""

    def __init__(self, block: GatedResidual, batch: int, width: int) -> None:
        self.first, self.second = block.first.incremental(batch, width), block.second.incremental(batch, width)
        self.extra = block.extra.incremental() if block.extra else None
        self.condition = block.condition.incremental() if block.condition else None
        self.width = width

    def begin_row(self, row: int, condition: Float[Tensor, "w b c"] | None = None) -> None:
        """Prepare a row; `condition` is the conditioning map's row that lies over it, w dividing W."""
        self.first.begin_row(row)
        projected = None
        if self.condition is not None and condition is not None:
            projected = self.condition(condition)
            if 1 < len(projected) < self.width:
                projected = projected.repeat_interleave(self.width // len(projected), 0)
        self.second.begin_row(row, projected)

    def at(self, column: Column, x: Float[Tensor, "b c"], extra: Tensor | None = None) -> Float[Tensor, "b c"]:
        """The block's output at this column."""
        self.first.put(column, F.elu(x))
        hidden = self.first.at(column)
        if self.extra is not None and extra is not None:
            hidden += self.extra(F.elu(extra))
        self.second.put(column, F.elu_(hidden))
        return F.glu(self.second.at(column), 1).add_(x)


class CausalAttention(nn.Module):
    """Multi-head attention to all positions up to and including this one, in raster order.

    Keys and values are made from the block's input, its output and the coordinates; queries from the output and the
    coordinates (Chen et al. 2018). Inclusive attention is causal here, since the first layer has shifted the input by
    one.
    """

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.width = heads, channels // 2
        wide, narrow = 2 * channels + 2, channels + 2
        self.key_block = GatedResidual(wide, channels, 1, dropout=dropout)
        self.query_block = GatedResidual(narrow, channels, 1, dropout=dropout)
        self.key_value = Pointwise(wide, 2 * self.width)
        self.query = Pointwise(narrow, self.width)

    def forward(self, inputs: Tensor, features: Tensor, coordinates: Float[Tensor, "b 2 h w"]) -> Tensor:
        key, value = self.key_value(self.key_block(torch.cat([inputs, features, coordinates], 1))).chunk(2, 1)
        query = self.query(self.query_block(torch.cat([features, coordinates], 1)))
        height, width = query.shape[2:]
        query, key, value = (self._split(x) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(2, 3).reshape(len(query), self.width, height, width)

    def incremental(self, batch: int, height: int, width: int) -> "IncrementalAttention":
        """The incremental twin."""
        return IncrementalAttention(self, batch, height, width)

    def _split(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b heads n e"]:
        # Contiguous, without which no fused kernel takes it and all N × N weights would be kept.
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3).contiguous()


class IncrementalAttention:
    """Attention with cached keys and values."""

    def __init__(self, attention: CausalAttention, batch: int, height: int, width: int) -> None:
        self.key_block = attention.key_block.incremental(batch, width)
        self.query_block = attention.query_block.incremental(batch, width)
        self.key_value, self.query = attention.key_value.incremental(), attention.query.incremental()
        self.heads = attention.heads
        self.cache = self.query.weight.new_zeros(2, batch, self.heads, height * width, attention.width // self.heads)
        self.width, self.row = width, 0
        self.start = torch.zeros(1, dtype=torch.int64, device=self.cache.device)  # position of the row's first column
        self.positions = torch.arange(height * width, device=self.cache.device)

    def begin_row(self, row: int) -> None:
        """Prepare a row."""
        self.row = row
        self.start.fill_(row * self.width)
        self.key_block.begin_row(row)
        self.query_block.begin_row(row)

    def at(self, column: Column, inputs: Tensor, features: Tensor, coordinates: Float[Tensor, "b 2"]) -> Tensor:
        """What attention gives at this column, (B, channels / 2)."""
        wide = torch.cat([inputs, features, coordinates], 1)
        key_value = self.key_value(self.key_block.at(column, wide)).view(len(inputs), 2, self.heads, -1)
        query = self.query(self.query_block.at(column, torch.cat([features, coordinates], 1)))
        query = query.view(len(inputs), self.heads, 1, -1)
        return attend(self.cache, key_value.transpose(0, 1), query, self._position(column), self.positions).flatten(1)

    def _position(self, column: Column) -> Column:
        return self.start + column if isinstance(column, Tensor) else self.row * self.width + column


def attend(
    cache: Float[Tensor, "2 b heads n e"],
    key_value: Float[Tensor, "2 b heads e"],
    query: Float[Tensor, "b heads 1 e"],
    position: Column,
    positions: Int[Tensor, " n"],
) -> Float[Tensor, "b heads 1 e"]:
    """Put the key and value of a position into the cache, then attend from it to all up to it."""
    if isinstance(position, Tensor):
        cache.index_copy_(3, position, key_value.unsqueeze(3))
        keys, values = cache
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=(positions <= position)[None, None, None])
    cache[:, :, :, position] = key_value
    keys, values = cache[:, :, :, : position + 1]
    return F.scaled_dot_product_attention(query, keys, values)


def coordinate_map(height: int, width: int, device: torch.device | str) -> Float[Tensor, "2 h w"]:
    """Row and column of every position, from −0.5 to 0.5."""
    rows = (torch.arange(height, device=device) + 0.5) / height - 0.5
    columns = (torch.arange(width, device=device) + 0.5) / width - 0.5
    return torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)])


def upsample_to(x: Float[Tensor, "b c h w"], height: int, width: int) -> Tensor:
    """Repeat a map up to a size that its own divides; a map of size 1 × 1 is left to broadcasting."""
    if x.shape[2:] == (1, 1) or x.shape[2:] == (height, width):
        return x
    return F.interpolate(x, size=(height, width), mode="nearest")

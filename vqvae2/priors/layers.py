"""Causal convolutions and gated residual blocks, each as a module for whole maps and as an incremental counterpart.

Maps are (B, C, H, W). Incremental layers compute the contribution of finished rows to a causal convolution once per row
for all columns (`toom_cook.py`). A position then costs only the taps on its own row, which are read as a view of the
row's buffer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

from vqvae2.priors.base import Column
from vqvae2.priors.causal_conv import CausalTaps, causal_conv2d, is_eager_cpu, split_weight
from vqvae2.priors.toom_cook import IncrementalRowConv


class CausalConv2d(nn.Module):
    """Convolution over `kernel_size` − 1 rows above, `kernel_size` columns wide, and the positions to the left.

    `include_current=False` masks the position itself, as in the first layer of a network (mask type A of PixelCNN).
    `rows_above=0` gives a convolution along the row. Only unmasked taps have weights, in raster order: 23 for kernel
    size 5, or 22 without the current position.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        include_current: bool = True,
        rows_above: int | None = None,
    ) -> None:
        super().__init__()
        rows_above = kernel_size - 1 if rows_above is None else rows_above
        self.taps = CausalTaps(kernel_size, rows_above, kernel_size // 2 + int(include_current))
        self.kernel_size, self.padding, self.rows_above = kernel_size, self.taps.padding, rows_above
        self.taps_above, self.taps_current = self.taps.above, self.taps.current
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, self.taps_above + self.taps_current))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        weight_norm(self, "weight")

    def forward(self, x: Float[Tensor, "b i h w"], elu: bool = False, dropout: float = 0.0) -> Float[Tensor, "b o h w"]:
        """Convolve x, or with `elu`, the dropout of ELU(x)."""
        if is_eager_cpu(x) and not torch.is_autocast_enabled("cpu") and is_parametrized(self, "weight"):
            parametrized: Any = self.parametrizations
            length, direction = parametrized.weight.original0, parametrized.weight.original1
            return causal_conv2d(x, direction, length, self.bias, self.taps, elu, dropout)
        x = F.dropout(F.elu(x), dropout) if elu else x
        (part,) = split_weight(self.weight, self.taps, 0)  # not tiled
        return F.conv2d(F.pad(x, part.padding), part.weight, self.bias)

    def incremental(self, batch: int, width: int) -> "IncrementalConv2d":
        """Return the incremental counterpart for a batch of maps of this width."""
        return IncrementalConv2d(self, batch, width)

    def weight_above(self, weight: Tensor) -> Float[Tensor, "o i r k"]:
        """Return the weights of the taps on finished rows."""
        return weight[:, :, : self.taps_above].unflatten(2, (self.rows_above, self.kernel_size))


class IncrementalConv2d:
    """Incremental causal convolution: `begin_row`, then `set_input` and `output` for each column."""

    def __init__(self, conv: CausalConv2d, batch: int, width: int) -> None:
        weight = conv.weight.detach()  # with weight norm folded in
        out_channels, in_channels, _ = weight.shape
        self.above = IncrementalRowConv(conv.weight_above(weight), batch, width) if conv.taps_above else None
        # (O, taps · I), in the order of a flattened window
        self.weight = weight[:, :, conv.taps_above :].transpose(1, 2).reshape(out_channels, -1).contiguous()
        self.bias = conv.bias.detach()[:, None]
        self.row = weight.new_zeros(batch, width + conv.padding, in_channels)  # inputs of the current row
        # Batch last: with few columns, a CPU is 1.5 times as fast with the weights as the left factor.
        self.row_outputs = weight.new_zeros(width, out_channels, batch)
        self.slots = [self.row[:, conv.padding + column] for column in range(width)]
        self.windows = [self.row[:, column : column + conv.taps_current].flatten(1).T for column in range(width)]
        self.padding = conv.padding
        self.window_offsets = torch.arange(conv.taps_current, device=weight.device)

    def begin_row(self, row: int, extra: Float[Tensor, "w b o"] | None = None) -> None:
        """Compute the taps on finished rows for all columns. `extra` (W or 1, B, O) is added to the output."""
        if self.above is not None and row > 0:
            self.above.push(self.row[:, self.padding :])
            torch.add(self.above.contribution(), self.bias, out=self.row_outputs)
        else:
            self.row_outputs.copy_(self.bias)
        if extra is not None:
            self.row_outputs += extra.transpose(1, 2)

    def set_input(self, column: Column, values: Float[Tensor, "b i"]) -> None:
        """Set the input at a column of the current row."""
        if isinstance(column, Tensor):
            self.row.index_copy_(1, column + self.padding, values[:, None])
        else:
            self.slots[column].copy_(values)

    def output(self, column: Column) -> Float[Tensor, "b o"]:
        """Return the output at a column of the current row."""
        if isinstance(column, Tensor):
            window = self.row.index_select(1, column + self.window_offsets).flatten(1)
            return torch.addmm(self.row_outputs.index_select(0, column)[0], self.weight, window.T).T
        return torch.addmm(self.row_outputs[column], self.weight, self.windows[column]).T


class PointwiseConv2d(nn.Module):
    """1×1 convolution with weight normalization."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        weight_norm(self.conv, "weight")

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        return self.conv(x)

    def incremental(self) -> "IncrementalPointwiseConv2d":
        """Return the incremental counterpart."""
        return IncrementalPointwiseConv2d(self.conv)


class IncrementalPointwiseConv2d:
    """1×1 convolution of vectors (..., in_channels)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        self.weight = conv.weight.detach().flatten(1).contiguous()
        self.bias = None if conv.bias is None else conv.bias.detach()

    def __call__(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        return F.linear(x, self.weight, self.bias)


class GatedResidualBlock(nn.Module):
    """x + GLU(conv(ELU(conv(ELU(x)) + extra)) + condition), the block of PixelSNAIL (Chen et al. 2018).

    `kernel_size=1` makes it pointwise. `extra_channels` are the channels of an optional second input of the same size.
    `condition_channels` are those of an optional conditioning map, whose size must divide the size of the input. It is
    projected first and then upsampled.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        kernel_size: int,
        extra_channels: int = 0,
        condition_channels: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.first = CausalConv2d(channels, hidden_channels, kernel_size)
        self.second = CausalConv2d(hidden_channels, 2 * channels, kernel_size)
        self.extra = PointwiseConv2d(extra_channels, hidden_channels) if extra_channels else None
        self.condition = PointwiseConv2d(condition_channels, 2 * channels, bias=False) if condition_channels else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, extra: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        hidden = self.first(x, elu=True)
        if self.extra is not None and extra is not None:
            hidden += self.extra(F.elu(extra))
        gates = self.second(hidden, elu=True, dropout=self.dropout.p if self.training else 0.0)
        if self.condition is not None and condition is not None:
            gates += upsample_to(self.condition(condition), gates.shape[2], gates.shape[3])
        return x + glu(gates)

    def incremental(self, batch: int, width: int) -> "IncrementalGatedResidualBlock":
        """Return the incremental counterpart for a batch of maps of this width."""
        return IncrementalGatedResidualBlock(self, batch, width)


class IncrementalGatedResidualBlock:
    """Incremental gated residual block."""

    def __init__(self, block: GatedResidualBlock, batch: int, width: int) -> None:
        self.first, self.second = block.first.incremental(batch, width), block.second.incremental(batch, width)
        self.extra = block.extra.incremental() if block.extra else None
        self.condition = block.condition.incremental() if block.condition else None
        self.width = width

    def begin_row(self, row: int, condition: Float[Tensor, "w b c"] | None = None) -> None:
        """Start a row. `condition` is the row of the conditioning map above it; its width divides the row's."""
        self.first.begin_row(row)
        projected = None
        if self.condition is not None and condition is not None:
            projected = upsample_row(self.condition(condition), self.width)
        self.second.begin_row(row, projected)

    def step(self, column: Column, x: Float[Tensor, "b c"], extra: Tensor | None = None) -> Float[Tensor, "b c"]:
        """Return the output at a column of the current row."""
        self.first.set_input(column, F.elu(x))
        hidden = self.first.output(column)
        if self.extra is not None and extra is not None:
            hidden += self.extra(F.elu(extra))
        self.second.set_input(column, F.elu_(hidden))
        return F.glu(self.second.output(column), 1).add_(x)


def glu(gates: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b c h w"]:
    """Compute `F.glu(gates, 1)`. On a CPU, the gradient keeps the memory format that convolutions are fast with."""
    return _GLU.apply(gates) if is_eager_cpu(gates) else F.glu(gates, 1)


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
        grad_value, grad_gate = result.chunk(2, 1)
        value, gate = gates.chunk(2, 1)
        sigmoid = gate.sigmoid()
        torch.mul(gradients[0], sigmoid, out=grad_value)
        torch.mul(gradients[0], value, out=grad_gate)
        grad_gate.mul_(sigmoid.mul_(1 - sigmoid))
        return result


def coordinate_map(height: int, width: int, device: torch.device | str) -> Float[Tensor, "2 h w"]:
    """Return the row and column of every position, scaled to (−0.5, 0.5)."""
    rows = (torch.arange(height, device=device) + 0.5) / height - 0.5
    columns = (torch.arange(width, device=device) + 0.5) / width - 0.5
    return torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)])


def upsample_to(x: Float[Tensor, "b c h w"], height: int, width: int) -> Tensor:
    """Upsample a map to a multiple of its size by repetition. A 1 × 1 map is returned as is, for broadcasting."""
    if x.shape[2:] == (1, 1) or x.shape[2:] == (height, width):
        return x
    return F.interpolate(x, size=(height, width), mode="nearest")


def upsample_row(row: Float[Tensor, "w b c"], width: int) -> Float[Tensor, "w2 b c"]:
    """Upsample one row of a map as `upsample_to` does."""
    return row.repeat_interleave(width // len(row), 0) if 1 < len(row) < width else row

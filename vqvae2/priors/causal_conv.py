"""Training of causal convolutions on a CPU with little memory.

Autograd would save the activated, dropped and padded inputs of a convolution, and its normalized weights. All of them
are recomputed in the backward pass from the input before the activation, which a residual network has anyway.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae2.priors import toom_cook


class CausalTaps(NamedTuple):
    """The taps of a causal convolution, in raster order: rows above the current position, then the current row."""

    kernel_size: int  # columns of the rows above
    rows_above: int
    current: int  # taps on the current row, of which the last is the current position or the one before it

    @property
    def above(self) -> int:
        """Number of taps on the rows above."""
        return self.rows_above * self.kernel_size

    @property
    def padding(self) -> int:
        """Columns to the left of the current position."""
        return self.kernel_size // 2


class _Part(NamedTuple):
    """A convolution without padding. The outputs of all parts are added."""

    weight: Tensor  # (O, I, rows, columns)
    padding: tuple[int, int, int, int]  # of its inputs: left, right, top, bottom
    taps: slice  # of the causal convolution
    tiled: bool


def is_eager_cpu(x: Tensor) -> bool:
    """Return whether operations on `x` run on a CPU and one by one."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def causal_conv2d(
    x: Tensor, direction: Tensor, length: Tensor, bias: Tensor, taps: CausalTaps, elu: bool, dropout: float
) -> Tensor:
    """Convolve x (B, I, H, W), or the dropout of ELU(x), with weights in the parametrization of weight norm."""
    dropped = torch.empty_like(x, dtype=torch.bool).bernoulli_(dropout) if dropout else None
    return _CausalConv2d.apply(x, dropped, direction, length, bias, taps, elu, 1 / (1 - dropout))


def split_weight(weight: Tensor, taps: CausalTaps, width: int) -> list[_Part]:
    """Return convolutions whose sum is the causal convolution with a weight (O, I, taps) on rows of `width` columns."""
    side = taps.padding
    above = weight[:, :, : taps.above].unflatten(2, (taps.rows_above, taps.kernel_size)) if taps.above else None
    current = weight[:, :, None, taps.above :]
    if above is None or toom_cook.should_tile(above, width):
        parts = [_Part(current, (side, taps.current - 1 - side, 0, 0), slice(taps.above, None), False)]
        if above is not None:
            parts.append(_Part(above, (side, side, taps.rows_above, -1), slice(taps.above), True))
        return parts
    masked = taps.kernel_size - taps.current  # the last taps of the current row
    square = F.pad(weight, (0, masked)).unflatten(2, (taps.rows_above + 1, taps.kernel_size))
    return [_Part(square, (side, side, taps.rows_above, 0), slice(None), False)]


class _CausalConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        direction: Tensor,
        length: Tensor,
        bias: Tensor,
        taps: CausalTaps,
        elu: bool,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, dropped, direction, length)
        ctx.taps, ctx.elu, ctx.scale = taps, elu, scale
        inputs = _activate(x, dropped, elu, scale)
        weight, _ = torch.ops.aten._weight_norm_interface(direction, length, 0)
        first, *others = split_weight(weight, taps, x.shape[3])
        output = F.conv2d(_pad(inputs, first.padding), first.weight, bias)
        for part in others:
            output += toom_cook.tiled_conv2d(_pad(inputs, part.padding), part.weight)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, dropped, direction, length) = gradients, ctx.saved_tensors
        weight, norms = torch.ops.aten._weight_norm_interface(direction, length, 0)
        grad_weight = torch.empty_like(weight)
        grad_x = grad_bias = None
        inputs = _activate(x, dropped, ctx.elu, ctx.scale)
        grad_padded: Any
        grad_part: Any
        for part in split_weight(weight, ctx.taps, x.shape[3]):
            padded = _pad(inputs, part.padding)
            if part.tiled:
                grad_padded, grad_part = toom_cook.tiled_conv2d_backward(
                    gradient, padded, part.weight, ctx.needs_input_grad[0]
                )
            else:
                grad_padded, grad_part, grad_bias = torch.ops.aten.convolution_backward(
                    *(gradient, padded, part.weight, [len(weight)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
                    [ctx.needs_input_grad[0], True, True],
                )
            target = grad_weight[:, :, part.taps]
            target.copy_(grad_part.flatten(2)[:, :, : target.shape[2]])
            if ctx.needs_input_grad[0]:
                unpadded = _unpad(grad_padded, part.padding, x.shape[3])
                if grad_x is None:
                    grad_x = unpadded
                else:
                    grad_x[:, :, : unpadded.shape[2]] += unpadded
            del padded, grad_padded
        if grad_x is not None and ctx.elu:
            del inputs
            if dropped is not None:
                grad_x.masked_fill_(dropped, 0).mul_(ctx.scale)
            grad_x = torch.ops.aten.elu_backward(grad_x, 1, 1, 1, False, x)
        grads = torch.ops.aten._weight_norm_interface_backward(grad_weight, direction, length, norms, 0)
        return grad_x, None, *grads, grad_bias, None, None, None


def _activate(x: Tensor, dropped: Tensor | None, elu: bool, scale: float) -> Tensor:
    if not elu:
        return x
    activated = F.elu(x)
    return activated if dropped is None else activated.masked_fill_(dropped, 0).mul_(scale)


def _pad(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    return F.pad(x, padding) if any(padding) else x


def _unpad(x: Tensor, padding: tuple[int, int, int, int], width: int) -> Tensor:
    """Return the gradient of what was padded to a map of `width` columns. Rows that were cut off are left out."""
    left, right, top, _ = padding
    if right < 0:  # a column that was cut off
        x = F.pad(x, (0, -right))
    return x[:, :, top:, left : left + width]

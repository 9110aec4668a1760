"""Convolutions over finished rows, with fewer multiplications: the Toom–Cook algorithm along the width (Winograd 1980).

Four neighbouring outputs of a row share their inputs: transformed, they take k + 3 products for each row of the kernel
instead of 4 k, so 8 for 20 at kernel 5, and each product is one large matrix multiplication. In float32 the error is
about twice that of the direct sum. It serves processors; a GPU, whose libraries convolve well, takes tiles of one
output, which is the direct sum.

A tile mixes all of its inputs, whose rounding errors reach all of its outputs. So it is used for rows above a position
only, where every column is in the past: causality stays exact.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)  # where the polynomials are evaluated, besides infinity
_TILE = 4
_WORTH = 96 * 96  # channels in × out from which the saved products pay for the transforms


class Transforms(NamedTuple):
    """out (m × n), into (n × n), weights (n × k): y = out · ((into · x) ⊙ (weights · w)) for m outputs of k taps."""

    out: Tensor
    into: Tensor
    weights: Tensor

    @property
    def tile(self) -> int:
        """m, how many outputs."""
        return len(self.out)

    @property
    def points(self) -> int:
        """n = m + k − 1, how many inputs, and products."""
        return len(self.into)


@cache
def transforms(tile: int, kernel: int) -> Transforms:
    """The three matrices, float32; the direct sum for tiles of one."""
    if tile == 1:
        return Transforms(torch.ones(1, kernel), torch.eye(kernel), torch.eye(kernel))
    count = tile + kernel - 1
    points = torch.tensor(_POINTS[: count - 1], dtype=torch.float64)
    if len(points) < count - 1:
        raise ValueError(f"tiles of {tile} outputs of {kernel} taps need {count - 1} points; there are {len(_POINTS)}")
    into = torch.linalg.inv(_evaluation(points, count)).T
    scale = into.abs().amax(1, keepdim=True)  # moved to the weights, so that inputs stay as large as they are
    out, weights = _evaluation(points, tile).T, _evaluation(points, kernel) * scale
    return Transforms(out.float().contiguous(), (into / scale).float().contiguous(), weights.float())


def _evaluation(points: Tensor, coefficients: int) -> Tensor:
    """The matrix that evaluates a polynomial at the points and, for its last coefficient, at infinity."""
    infinity = torch.zeros(1, coefficients, dtype=points.dtype)
    infinity[0, -1] = 1
    return torch.cat([points[:, None] ** torch.arange(coefficients, dtype=points.dtype), infinity])


def tiled(weight: Tensor, width: int) -> bool:
    """Whether tiles of four are worth it for a weight (O, I, …, k) and rows of this width."""
    kernel, outputs, inputs = weight.shape[-1], *weight.shape[:2]
    fits = kernel in (3, 5) and width >= _TILE and outputs * inputs >= _WORTH
    return fits and weight.device.type == "cpu" and weight.dtype == torch.float32


def conv2d(x: Float[Tensor, "b i h w"], weight: Float[Tensor, "o i r k"]) -> Float[Tensor, "b o h2 w2"]:
    """F.conv2d(x, weight) on a processor: r rows and k columns, no padding, sizes (h − r + 1, w − k + 1)."""
    return _TiledConv.apply(x, weight, transforms(_TILE, weight.shape[3]))


class _TiledConv(torch.autograd.Function):
    """Keeps the input and the weight alone; their transforms, twice as large, are made again in the backward pass.

    Transformed maps are (points, rows, batch · tiles, channels): what a row of the kernel reads is a slice of them, so
    each is one batched matrix product, without a copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, matrices: Transforms) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.matrices = matrices
        values, weights = _into(x, matrices), _weights(weight, matrices)
        rows = values.shape[1] - len(weights) + 1
        products = torch.bmm(_rows(values, 0, rows), weights[0].transpose(1, 2))
        for row in range(1, len(weights)):
            products.baddbmm_(_rows(values, row, rows), weights[row].transpose(1, 2))
        return _out(products, len(x), x.shape[3] - weight.shape[3] + 1, matrices)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), matrices = ctx.saved_tensors, ctx.matrices
        gradient = _out_transposed(gradients[0], matrices)
        reach, rows = weight.shape[2], gradients[0].shape[2]
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            weights = _weights(weight, matrices)
            inner = gradient.new_zeros(matrices.points, x.shape[2], gradient.shape[1] // rows, x.shape[1])
            for row in range(reach):
                _rows(inner, row, rows).baddbmm_(gradient, weights[row])
            for_x = _into_transposed(inner, x, matrices)
            del inner
        if ctx.needs_input_grad[1]:
            values, inner = _into(x, matrices), torch.empty_like(_weights(weight, matrices))
            for row in range(reach):
                torch.bmm(gradient.transpose(1, 2), _rows(values, row, rows), out=inner[row])
            for_weight = (inner.view(-1, weight.shape[:2].numel()).T @ _of_rows(matrices, reach)).view(weight.shape)
        return for_x, for_weight, None


def _rows(values: Float[Tensor, "p h bt c"], first: int, count: int) -> Float[Tensor, "p h2bt c"]:
    """A view of `count` rows."""
    return values[:, first : first + count].flatten(1, 2)


def _tiles(width: int, matrices: Transforms) -> int:
    """How many tiles cover `width` outputs."""
    return -(-width // matrices.tile)


def _into(x: Float[Tensor, "b i h w"], matrices: Transforms) -> Float[Tensor, "p h bt i"]:
    """Every tile's inputs, transformed."""
    batch, inputs, height, width = x.shape
    tiles = _tiles(width - matrices.points + matrices.tile, matrices)
    x = F.pad(x, (0, tiles * matrices.tile + matrices.points - matrices.tile - width))
    windows = x.unfold(3, matrices.points, matrices.tile).permute(4, 2, 0, 3, 1).reshape(matrices.points, -1)
    return (matrices.into @ windows).view(matrices.points, height, batch * tiles, inputs)


def _into_transposed(gradient: Float[Tensor, "p h bt i"], x: Tensor, matrices: Transforms) -> Float[Tensor, "b i h w"]:
    batch, inputs, height, width = x.shape
    tile, points, tiles = matrices.tile, matrices.points, gradient.shape[2] // len(x)
    windows = (matrices.into.T @ gradient.view(points, -1)).view(points, height, batch, tiles, inputs)
    blocks = -(-points // tile)  # a tile reaches into so many, counted from its own
    result = x.new_zeros(batch, height, tiles + blocks - 1, tile, inputs)
    for block in range(blocks):
        part = windows[block * tile : (block + 1) * tile].permute(2, 1, 3, 0, 4)
        result[:, :, block : block + tiles, : part.shape[3]] += part
    return result.flatten(2, 3)[:, :, :width].permute(0, 3, 1, 2)


def _weights(weight: Float[Tensor, "o i r k"], matrices: Transforms) -> Float[Tensor, "r p o i"]:
    outputs, inputs, reach, _ = weight.shape
    products = _of_rows(matrices, reach) @ weight.flatten(2).flatten(0, 1).T
    return products.view(reach, matrices.points, outputs, inputs)


def _of_rows(matrices: Transforms, reach: int) -> Float[Tensor, "rp rk"]:
    """The transform of weights for all rows of a kernel at once: one product, and no permuted copy of the weights."""
    return torch.block_diag(*[matrices.weights] * reach)


def _out(
    products: Float[Tensor, "p h2bt o"], batch: int, width: int, matrices: Transforms
) -> Float[Tensor, "b o h2 w2"]:
    tiles, outputs = _tiles(width, matrices), products.shape[2]
    tile = (matrices.out @ products.view(matrices.points, -1)).view(matrices.tile, -1, batch, tiles, outputs)
    return tile.permute(2, 1, 3, 0, 4).flatten(2, 3)[:, :, :width].permute(0, 3, 1, 2)


def _out_transposed(gradient: Float[Tensor, "b o h2 w2"], matrices: Transforms) -> Float[Tensor, "p h2bt o"]:
    _, outputs, _, width = gradient.shape
    tiles = _tiles(width, matrices)
    gradient = F.pad(gradient, (0, tiles * matrices.tile - width)).unflatten(3, (tiles, matrices.tile))
    gradient = gradient.permute(4, 2, 0, 3, 1).reshape(matrices.tile, -1)
    return (matrices.out.T @ gradient).view(matrices.points, -1, outputs)


class IncrementalRowConv:
    """What the last r finished rows contribute to every column of the next, for sampling.

    Each finished row is transformed once and kept until it is out of reach.
    """

    def __init__(self, weight: Float[Tensor, "o i r k"], batch: int, width: int) -> None:
        outputs, inputs, self.reach, kernel = weight.shape
        matrices = transforms(_TILE if tiled(weight, width) else 1, kernel)
        self.matrices = Transforms(*(matrix.to(weight) for matrix in matrices))
        # (rows, points, O, I), the row just above last
        self.weights = torch.einsum("pk,oirk->rpoi", self.matrices.weights, weight).contiguous()
        self.shape = (width, outputs, batch)
        tiles = -(-width // matrices.tile)
        self.padded = weight.new_zeros(batch, matrices.tile * tiles + kernel - 1, inputs)
        self.inside = self.padded[:, kernel // 2 : kernel // 2 + width]
        self.finished: list[Tensor] = []  # transformed rows (points, I, B · tiles), the latest last

    def push(self, row: Float[Tensor, "b w i"]) -> None:
        """Take in a row that is finished."""
        self.inside.copy_(row)
        windows = self.padded.unfold(1, self.matrices.points, self.matrices.tile)  # (B, tiles, I, points)
        windows = windows.permute(3, 0, 1, 2).reshape(self.matrices.points, -1)
        values = (self.matrices.into @ windows).view(self.matrices.points, -1, self.padded.shape[2])
        self.finished = [*self.finished, values.transpose(1, 2)][-self.reach :]

    def contribution(self) -> Float[Tensor, "w o b"]:
        """The sum over the rows that there are; at least one must be."""
        weights = self.weights[self.reach - len(self.finished) :]
        products = torch.bmm(weights[0], self.finished[0])
        for weight, row in zip(weights[1:], self.finished[1:], strict=True):
            products.baddbmm_(weight, row)
        width, outputs, batch = self.shape
        summed = (self.matrices.out @ products.view(self.matrices.points, -1)).view(-1, outputs, batch, self._tiles())
        return summed.permute(3, 0, 1, 2).reshape(-1, outputs, batch)[:width]

    def _tiles(self) -> int:
        return -(-self.shape[0] // self.matrices.tile)

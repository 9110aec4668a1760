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
from torch.nn.grad import conv2d_input, conv2d_weight

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
    """Keeps the input and the weight alone; their transforms, twice as large, are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, matrices: Transforms) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.matrices = matrices
        products = F.conv2d(_into(x, matrices), _weights(weight, matrices), groups=matrices.points)
        return _out(products, matrices)[..., : x.shape[3] - weight.shape[3] + 1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), matrices = ctx.saved_tensors, ctx.matrices
        values, weights = _into(x, matrices), _weights(weight, matrices)
        gradient = _out_transposed(gradients[0], matrices)
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            inner = conv2d_input(values.shape, weights, gradient, groups=matrices.points)
            for_x = _into_transposed(inner, x, matrices)
        if ctx.needs_input_grad[1]:
            inner = conv2d_weight(values, weights.shape, gradient, groups=matrices.points)
            inner = inner.view(matrices.points, *weight.shape[:3])
            for_weight = torch.einsum("pk,poir->oirk", matrices.weights, inner)
        return for_x, for_weight, None


def _tiles(width: int, matrices: Transforms) -> int:
    """How many tiles cover the outputs of a row of `width` inputs."""
    outputs = width - (matrices.points - matrices.tile)
    return -(-outputs // matrices.tile)


def _into(x: Float[Tensor, "b i h w"], matrices: Transforms) -> Float[Tensor, "b pi h t"]:
    """Every tile's inputs, transformed: point after point, as groups of channels."""
    batch, inputs, height, width = x.shape
    tiles = _tiles(width, matrices)
    x = F.pad(x, (0, tiles * matrices.tile + matrices.points - matrices.tile - width))
    windows = x.unfold(3, matrices.points, matrices.tile).movedim(4, 1).reshape(batch, matrices.points, -1)
    return (matrices.into @ windows).view(batch, matrices.points * inputs, height, tiles)


def _into_transposed(gradient: Tensor, x: Tensor, matrices: Transforms) -> Tensor:
    batch, inputs, height, width = x.shape
    tile, points, tiles = matrices.tile, matrices.points, gradient.shape[3]
    windows = (matrices.into.T @ gradient.view(batch, points, -1)).view(batch, points, inputs, height, tiles)
    result = x.new_zeros(batch, inputs, height, tiles * tile + points - tile)
    for place in range(points):
        result[..., place : place + tile * (tiles - 1) + 1 : tile] += windows[:, place]
    return result[..., :width]


def _weights(weight: Float[Tensor, "o i r k"], matrices: Transforms) -> Float[Tensor, "po i r 1"]:
    return torch.einsum("pk,oirk->poir", matrices.weights, weight).flatten(0, 1)[..., None]


def _out(products: Float[Tensor, "b po h t"], matrices: Transforms) -> Float[Tensor, "b o h w"]:
    batch, _, height, tiles = products.shape
    outputs = matrices.out @ products.view(batch, matrices.points, -1)
    outputs = outputs.view(batch, matrices.tile, -1, height, tiles).permute(0, 2, 3, 4, 1)
    return outputs.reshape(batch, -1, height, tiles * matrices.tile)


def _out_transposed(gradient: Float[Tensor, "b o h w"], matrices: Transforms) -> Float[Tensor, "b po h t"]:
    batch, outputs, height, width = gradient.shape
    tiles = -(-width // matrices.tile)
    gradient = F.pad(gradient, (0, tiles * matrices.tile - width)).view(batch, outputs, height, tiles, matrices.tile)
    gradient = gradient.permute(0, 4, 1, 2, 3).reshape(batch, matrices.tile, -1)
    return (matrices.out.T @ gradient).view(batch, -1, height, tiles)


class RowsWalk:
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

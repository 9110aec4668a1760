"""Fast convolution over finished rows with the Toom–Cook algorithm along the width (Winograd 1980).

A tile of m neighboring outputs in a row shares its inputs. After a linear transform it takes m + k − 1 products per
kernel row instead of m · k, which is 8 instead of 20 for m = 4 and kernel size k = 5. All products of a kernel row are
one large matrix multiplication. In float32 the error is about twice that of direct summation. GPU libraries convolve
fast on their own, so GPUs use tiles of one output, which is direct summation.

A tile mixes all of its inputs, so rounding errors of each input affect all outputs of the tile. The algorithm is
therefore only used for the rows above a position. In raster order all their columns are earlier ones, and causality
stays exact; in wavefront order, later columns of these rows have the effect of a rounding error in the full pass.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)  # evaluation points of the polynomials, besides infinity
TILE_SIZE = 4
_MIN_CHANNEL_PRODUCT = 96 * 96  # in_channels × out_channels from which tiling is faster


class Transforms(NamedTuple):
    """Matrices with which y = output · ((input · x) ⊙ (weight · w)) are m outputs of a correlation with k taps."""

    output: Tensor  # (m, n)
    input: Tensor  # (n, n)
    weight: Tensor  # (n, k)

    @property
    def tile_size(self) -> int:
        """m, the number of outputs of a tile."""
        return len(self.output)

    @property
    def num_points(self) -> int:
        """n = m + k − 1, the number of inputs of a tile, and of products."""
        return len(self.input)

    def num_tiles(self, width: int) -> int:
        """Return the number of tiles that cover `width` outputs."""
        return -(-width // self.tile_size)


@cache
@torch.inference_mode(mode=False)  # the first call may be for sampling, and another one for training
def make_transforms(tile_size: int, kernel_size: int) -> Transforms:
    """Return float32 transforms. A tile size of 1 gives direct summation.

    Raises:
        ValueError: If there are too few evaluation points for these sizes.
    """
    if tile_size == 1:
        return Transforms(torch.ones(1, kernel_size), torch.eye(kernel_size), torch.eye(kernel_size))
    count = tile_size + kernel_size - 1
    points = torch.tensor(_POINTS[: count - 1], dtype=torch.float64)
    if len(points) < count - 1:
        raise ValueError(
            f"tile size {tile_size} and kernel size {kernel_size} need {count - 1} points, have {len(_POINTS)}"
        )
    inverse = torch.linalg.inv(_evaluation_matrix(points, count)).T
    scale = inverse.abs().amax(1, keepdim=True)  # moved into the weights, so that transformed inputs do not grow
    output = _evaluation_matrix(points, tile_size).T
    weight = _evaluation_matrix(points, kernel_size) * scale
    return Transforms(output.float().contiguous(), (inverse / scale).float().contiguous(), weight.float())


def _evaluation_matrix(points: Tensor, num_coefficients: int) -> Tensor:
    """Return the matrix that evaluates a polynomial at the points and at infinity (its last coefficient)."""
    infinity = torch.zeros(1, num_coefficients, dtype=points.dtype)
    infinity[0, -1] = 1
    return torch.cat([points[:, None] ** torch.arange(num_coefficients, dtype=points.dtype), infinity])


def should_tile(weight: Tensor, width: int) -> bool:
    """Return whether tiling is faster than direct summation for a weight (O, I, …, k) and rows of `width` columns."""
    kernel_size, out_channels, in_channels = weight.shape[-1], *weight.shape[:2]
    large_enough = width >= TILE_SIZE and out_channels * in_channels >= _MIN_CHANNEL_PRODUCT
    # Memory is estimated with weights on the meta device. Tiles take more of it, so this is an upper bound for a GPU.
    supported = kernel_size in (3, 5) and weight.device.type in ("cpu", "meta") and weight.dtype == torch.float32
    return supported and large_enough


def tiled_conv2d(x: Float[Tensor, "b i h w"], weight: Float[Tensor, "o i r k"]) -> Float[Tensor, "b o h2 w2"]:
    """Compute `F.conv2d(x, weight)` on a CPU: no padding, so the output size is (h − r + 1, w − k + 1)."""
    return _TiledConv2d.apply(x, weight)


class _TiledConv2d(torch.autograd.Function):
    """Tiled convolution that saves only its inputs. Their transforms, twice as large, are recomputed in backward.

    Transformed maps are (points, rows, batch · tiles, channels). The part that a kernel row reads is a slice, so each
    kernel row is one batched matrix product without a copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        transforms = make_transforms(TILE_SIZE, weight.shape[3])
        values, weights = _transform_input(x, transforms), transform_weight(weight, transforms)
        num_rows = values.shape[1] - len(weights) + 1
        products = torch.bmm(_slice_rows(values, 0, num_rows), weights[0].transpose(1, 2))
        for row in range(1, len(weights)):
            products.baddbmm_(_slice_rows(values, row, num_rows), weights[row].transpose(1, 2))
        return _transform_output(products, len(x), x.shape[3] - weight.shape[3] + 1, transforms)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return tiled_conv2d_backward(gradients[0], x, weight, *ctx.needs_input_grad)


def tiled_conv2d_backward(
    gradient: Float[Tensor, "b o h2 w2"],
    x: Float[Tensor, "b i h w"],
    weight: Float[Tensor, "o i r k"],
    needs_x: bool = True,
    needs_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the input and the weight of `tiled_conv2d`, given that of its output."""
    transforms = make_transforms(TILE_SIZE, weight.shape[3])
    kernel_rows, num_rows = weight.shape[2], gradient.shape[2]
    gradient = _transform_output_transposed(gradient, transforms)
    grad_x = grad_weight = None
    if needs_x:
        weights = transform_weight(weight, transforms)
        inner = gradient.new_zeros(transforms.num_points, x.shape[2], gradient.shape[1] // num_rows, x.shape[1])
        for row in range(kernel_rows):
            _slice_rows(inner, row, num_rows).baddbmm_(gradient, weights[row])
        grad_x = _transform_input_transposed(inner, x, transforms)
        del inner
    if needs_weight:
        values, inner = _transform_input(x, transforms), torch.empty_like(transform_weight(weight, transforms))
        for row in range(kernel_rows):
            torch.bmm(gradient.transpose(1, 2), _slice_rows(values, row, num_rows), out=inner[row])
        inner = inner.view(-1, weight.shape[:2].numel())
        grad_weight = (inner.T @ _weight_transform_of_rows(transforms, kernel_rows)).view(weight.shape)
    return grad_x, grad_weight


def _slice_rows(values: Float[Tensor, "p h bt c"], first: int, count: int) -> Float[Tensor, "p h2bt c"]:
    """Return a view of `count` rows."""
    return values[:, first : first + count].flatten(1, 2)


def _transform_input(x: Float[Tensor, "b i h w"], transforms: Transforms) -> Float[Tensor, "p h bt i"]:
    batch, channels, height, width = x.shape
    tile_size, num_points = transforms.tile_size, transforms.num_points
    tiles = transforms.num_tiles(width - num_points + tile_size)
    x = F.pad(x, (0, tiles * tile_size + num_points - tile_size - width))
    windows = x.unfold(3, num_points, tile_size).permute(4, 2, 0, 3, 1).reshape(num_points, -1)
    return (transforms.input @ windows).view(num_points, height, batch * tiles, channels)


def _transform_input_transposed(
    gradient: Float[Tensor, "p h bt i"], x: Tensor, transforms: Transforms
) -> Float[Tensor, "b i h w"]:
    batch, channels, height, width = x.shape
    tile_size, num_points, tiles = transforms.tile_size, transforms.num_points, gradient.shape[2] // len(x)
    windows = (transforms.input.T @ gradient.view(num_points, -1)).view(num_points, height, batch, tiles, channels)
    blocks = -(-num_points // tile_size)  # the inputs of a tile span this many tiles, starting with its own
    result = x.new_zeros(batch, height, tiles + blocks - 1, tile_size, channels)
    for block in range(blocks):
        part = windows[block * tile_size : (block + 1) * tile_size].permute(2, 1, 3, 0, 4)
        result[:, :, block : block + tiles, : part.shape[3]] += part
    return result.flatten(2, 3)[:, :, :width].permute(0, 3, 1, 2)


def transform_weight(weight: Float[Tensor, "o i r k"], transforms: Transforms) -> Float[Tensor, "r p o i"]:
    """Return the transformed weights of each kernel row and point."""
    out_channels, in_channels, kernel_rows, _ = weight.shape
    products = _weight_transform_of_rows(transforms, kernel_rows) @ weight.flatten(2).flatten(0, 1).T
    return products.view(kernel_rows, transforms.num_points, out_channels, in_channels)


def _weight_transform_of_rows(transforms: Transforms, kernel_rows: int) -> Float[Tensor, "rp rk"]:
    """Return the weight transform of all kernel rows as one matrix, which saves a permuted copy of the weights."""
    return torch.block_diag(*[transforms.weight] * kernel_rows)


def _transform_output(
    products: Float[Tensor, "p h2bt o"], batch: int, width: int, transforms: Transforms
) -> Float[Tensor, "b o h2 w2"]:
    tiles, channels = transforms.num_tiles(width), products.shape[2]
    outputs = transforms.output @ products.view(transforms.num_points, -1)
    outputs = outputs.view(transforms.tile_size, -1, batch, tiles, channels)
    return outputs.permute(2, 1, 3, 0, 4).flatten(2, 3)[:, :, :width].permute(0, 3, 1, 2)


def _transform_output_transposed(
    gradient: Float[Tensor, "b o h2 w2"], transforms: Transforms
) -> Float[Tensor, "p h2bt o"]:
    _, channels, _, width = gradient.shape
    tiles, tile_size = transforms.num_tiles(width), transforms.tile_size
    gradient = F.pad(gradient, (0, tiles * tile_size - width)).unflatten(3, (tiles, tile_size))
    gradient = gradient.permute(4, 2, 0, 3, 1).reshape(tile_size, -1)
    return (transforms.output.T @ gradient).view(transforms.num_points, -1, channels)


class IncrementalRowConv:
    """Contribution of the last r finished rows to all columns of the next row, for sampling.

    Each finished row is transformed once, and cached until the kernel no longer reaches it.
    """

    def __init__(self, weight: Float[Tensor, "o i r k"], batch: int, width: int) -> None:
        out_channels, in_channels, self.kernel_rows, kernel_size = weight.shape
        transforms = make_transforms(TILE_SIZE if should_tile(weight, width) else 1, kernel_size)
        self.transforms = Transforms(*(matrix.to(weight) for matrix in transforms))
        self.weights = transform_weight(weight, self.transforms).contiguous()  # the last row is the one directly above
        self.shape = (width, out_channels, batch)
        self.tiles = self.transforms.num_tiles(width)
        self.padded = weight.new_zeros(batch, self.transforms.tile_size * self.tiles + kernel_size - 1, in_channels)
        self.inside = self.padded[:, kernel_size // 2 : kernel_size // 2 + width]
        self.finished: list[Tensor] = []  # transformed rows (points, I, B · tiles), latest last

    @property
    def max_cache_bytes(self) -> int:
        """Memory of the cached rows once there are as many as the kernel reaches."""
        batch, _, in_channels = self.padded.shape
        numbers = self.kernel_rows * self.transforms.num_points * in_channels * batch * self.tiles
        return numbers * self.padded.element_size()

    def push(self, row: Float[Tensor, "b w i"]) -> None:
        """Append a finished row."""
        self.inside.copy_(row)
        num_points = self.transforms.num_points
        windows = self.padded.unfold(1, num_points, self.transforms.tile_size)  # (B, tiles, I, points)
        windows = windows.permute(3, 0, 1, 2).reshape(num_points, -1)
        values = (self.transforms.input @ windows).view(num_points, -1, self.padded.shape[2])
        self.finished = [*self.finished, values.transpose(1, 2)][-self.kernel_rows :]

    def contribution(self) -> Float[Tensor, "w o b"]:
        """Return the sum over the finished rows, of which there must be at least one."""
        weights = self.weights[self.kernel_rows - len(self.finished) :]
        products = torch.bmm(weights[0], self.finished[0])
        for weight, row in zip(weights[1:], self.finished[1:], strict=True):
            products.baddbmm_(weight, row)
        width, out_channels, batch = self.shape
        outputs = self.transforms.output @ products.view(self.transforms.num_points, -1)
        outputs = outputs.view(-1, out_channels, batch, self.tiles)
        return outputs.permute(3, 0, 1, 2).reshape(-1, out_channels, batch)[:width]

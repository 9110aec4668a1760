"""Wavefront sampling: one step computes the next position of many rows, with the same result as raster order.

A causal convolution with kernel size k reads, in each row further up, at most (k − 1) / 2 columns further right. A row
can therefore follow the row above it at a distance of `skew` columns: at step t, row r is at column t − skew · r. A map
takes W + skew · (H − 1) steps instead of H · W positions, and each step reads the weights once for all rows in flight.

The inputs of a layer are stored by step, not by column. The input `d` rows above and `j` columns to the right of a
position belongs to step t + j − skew · d for all rows in flight, so each tap of a convolution is one slice of a buffer.
Tensors are (rows · batch, channels).
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vqvae2.priors import toom_cook
from vqvae2.priors.base import Wave, WavefrontShape
from vqvae2.priors.layers import CausalConv2d, GatedResidualBlock

_MIN_TILED_ROWS = 8  # rows in flight from which tiles are faster than raster order


def choose_skew(convs: Iterable[CausalConv2d], width: int) -> int | None:
    """Return the skew of the fastest wavefront order for these convolutions, None if raster order is faster.

    Measured on a CPU. If weights are too small for tiles, the time is that of calling operations, of which a wavefront
    has fewer. Tiles are faster if at least eight rows are in flight; with fewer, raster order computes larger products.
    """
    convs = list(convs)
    padding = max(conv.padding for conv in convs)
    if not any(_can_tile(conv, conv.weight, width) for conv in convs):
        return padding + 1
    return tiled_skew(padding) if width >= _MIN_TILED_ROWS * tiled_skew(padding) else None


def tiled_skew(padding: int) -> int:
    """Return the smallest multiple of the tile size at which all inputs of a tile are finished when it starts."""
    return -(-(toom_cook.TILE_SIZE + padding) // toom_cook.TILE_SIZE) * toom_cook.TILE_SIZE


def _can_tile(conv: CausalConv2d, weight: Tensor, width: int) -> bool:
    return conv.taps_above > 0 and toom_cook.should_tile(conv.weight_above(weight), width)


def _rows_of_buffer(first: int, end: int, batch: int) -> slice:
    """Return the entries of rows `first` to `end` − 1 of all images."""
    return slice(first * batch, end * batch)


class WavefrontConv2d:
    """Causal convolution: `set_input` and `output` for each step, in the order that the kernel requires.

    The taps of a step are gathered into one matrix product. If tiling is faster, it only has the taps on the current
    row, and the rows above are added for a tile of columns at once.
    """

    def __init__(self, conv: CausalConv2d, shape: WavefrontShape) -> None:
        weight = conv.weight.detach()  # with weight norm folded in
        _, in_channels, _ = weight.shape
        self.shape, self.rows_above = shape, conv.rows_above
        self.bias = conv.bias.detach()
        columns = range(-conv.padding, conv.padding + 1)
        # (steps back, rows above) of each tap, in raster order
        above = [(shape.skew * up - j, up) for up in range(conv.rows_above, 0, -1) for j in columns]
        current = [(-j, 0) for j in columns[: conv.taps_current]]
        self.tiles = None
        if shape.skew >= tiled_skew(conv.padding) and _can_tile(conv, weight, shape.width):
            self.tiles = TiledRowsAbove(conv.weight_above(weight), self.bias, shape)
            above, weight = [], weight[:, :, conv.taps_above :]
        self.taps = above + current
        self.weight = weight.transpose(1, 2).flatten(1).contiguous().T  # (taps · I, O)
        self.num_slots = 1 + (self.tiles.steps_back if self.tiles else max((back for back, _ in self.taps), default=0))
        slots = weight.new_zeros(self.num_slots, (conv.rows_above + shape.height) * shape.batch, in_channels)
        self.slots = list(slots)  # inputs by step modulo num_slots; zero outside of the map

    def set_input(self, wave: Wave, values: Float[Tensor, "rb i"]) -> None:
        """Set the inputs of the rows in flight."""
        slot = self.slots[wave.step % self.num_slots]
        # Rows that were in flight when the slot was last written are now past their last column.
        stale = max(0, wave.first - self.num_slots // self.shape.skew - 1)
        slot[self._part(stale, wave.first)] = 0
        slot[self._part(wave.first, wave.end)] = values

    def output(self, wave: Wave, extra: Float[Tensor, "rb o"] | None = None) -> Float[Tensor, "rb o"]:
        """Return the outputs of the rows in flight, plus `extra`."""
        window = torch.cat([self.input(wave.step - back, wave.first - up, wave.end - up) for back, up in self.taps], 1)
        offset = self.bias if self.tiles is None else self.tiles.output(wave, self)
        return torch.addmm(offset if extra is None else offset + extra, window, self.weight)

    def input(self, step: int, first: int, end: int) -> Float[Tensor, "rb i"]:
        """Return a view of the inputs of rows `first` to `end` − 1 at a recent step."""
        return self.slots[step % self.num_slots][self._part(first, end)]

    def _part(self, first: int, end: int) -> slice:
        return _rows_of_buffer(first + self.rows_above, end + self.rows_above, self.shape.batch)


class TiledRowsAbove:
    """Contribution of the rows above to a tile of columns of all rows in flight, with the Toom–Cook algorithm.

    The skew is a multiple of the tile size, so that tiles of all rows start at the same step. A tile of inputs is
    transformed once, when its last input is known, and used for the next kernel_size − 1 rows.
    """

    def __init__(self, weight: Float[Tensor, "o i r k"], bias: Float[Tensor, " o"], shape: WavefrontShape) -> None:
        _, in_channels, self.kernel_rows, kernel_size = weight.shape
        transforms = toom_cook.make_transforms(toom_cook.TILE_SIZE, kernel_size)
        self.transforms = toom_cook.Transforms(*(matrix.to(weight) for matrix in transforms))
        weights = toom_cook.transform_weight(weight, self.transforms).contiguous()
        self.weights = weights.transpose(2, 3).unbind()[::-1]  # (points, I, O) of each kernel row, nearest first
        self.bias, self.shape = bias, shape
        self.skew = shape.skew // self.transforms.tile_size  # in tiles
        self.steps_back = shape.skew + kernel_size // 2  # from the start of a tile to the first input of the latest
        num_slots = self.skew * (self.kernel_rows - 1) + 1
        length = (self.kernel_rows + shape.height) * shape.batch
        # transformed inputs by tile step modulo the number of slots
        self.slots = list(weight.new_zeros(num_slots, self.transforms.num_points, length, in_channels))
        self.outputs, self.first = weight.new_zeros(0), 0  # of the current tiles, and their first row

    def output(self, wave: Wave, conv: WavefrontConv2d) -> Float[Tensor, "rb o"]:
        """Return the contribution to the rows in flight, plus the bias."""
        tile, index = divmod(wave.step, self.transforms.tile_size)
        if index == 0:
            self._transform_inputs(tile, wave.step, conv)
            self._compute_outputs(tile)
        skipped = (wave.first - self.first) * self.shape.batch  # rows that end within the tile
        count = (wave.end - wave.first) * self.shape.batch
        return self.outputs[index, skipped : skipped + count]

    def _transform_inputs(self, tile: int, step: int, conv: WavefrontConv2d) -> None:
        first, end = self._rows(tile - self.skew)
        if first >= end:
            return
        steps = range(step - self.steps_back, step - self.steps_back + self.transforms.num_points)
        inputs = torch.stack([conv.input(back, first, end) for back in steps])
        values = (self.transforms.input @ inputs.flatten(1)).view_as(inputs)
        slot = self.slots[tile % len(self.slots)]
        slot[:, self._part(first, end)] = values

    def _compute_outputs(self, tile: int) -> None:
        first, end = self._rows(tile)
        products = None
        for up, weight in enumerate(self.weights, 1):
            slot = self.slots[(tile - self.skew * (up - 1)) % len(self.slots)]
            values = slot[:, self._part(first - up, end - up)]
            products = torch.bmm(values, weight) if products is None else products.baddbmm_(values, weight)
        assert products is not None
        outputs = self.transforms.output @ products.flatten(1)
        self.outputs = outputs.view(-1, *products.shape[1:]).add_(self.bias)
        self.first = first

    def _rows(self, tile: int) -> tuple[int, int]:
        """Return the first row that is at this step of tiles, and the one after the last."""
        num_tiles = self.transforms.num_tiles(self.shape.width)
        return max(0, (tile - num_tiles) // self.skew + 1), min(self.shape.height, tile // self.skew + 1)

    def _part(self, first: int, end: int) -> slice:
        return _rows_of_buffer(first + self.kernel_rows, end + self.kernel_rows, self.shape.batch)


class WavefrontGatedResidualBlock:
    """Gated residual block of positions (rows · batch, channels)."""

    def __init__(
        self, block: GatedResidualBlock, shape: WavefrontShape, condition: Float[Tensor, "p b c"] | None = None
    ) -> None:
        self.first, self.second = WavefrontConv2d(block.first, shape), WavefrontConv2d(block.second, shape)
        self.extra = block.extra.incremental() if block.extra else None
        self.condition = None  # (positions, B, O)
        if block.condition is not None and condition is not None:
            self.condition = block.condition.incremental()(condition)

    def step(
        self,
        wave: Wave,
        x: Float[Tensor, "rb c"],
        condition_positions: Int[Tensor, " r"] | None = None,
        extra: Float[Tensor, "rb e"] | None = None,
    ) -> Float[Tensor, "rb c"]:
        """Return the outputs of the rows in flight, each with its position in the conditioning map."""
        self.first.set_input(wave, F.elu(x))
        hidden = self.first.output(wave, None if self.extra is None or extra is None else self.extra(F.elu(extra)))
        self.second.set_input(wave, F.elu_(hidden))
        condition = None
        if self.condition is not None and condition_positions is not None:
            condition = self.condition.index_select(0, condition_positions).flatten(0, 1)
        return F.glu(self.second.output(wave, condition), 1).add_(x)

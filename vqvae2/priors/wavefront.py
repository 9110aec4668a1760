"""Wavefront sampling: one step computes the next position of many rows, with the same result as raster order.

A causal convolution with kernel size k reads, in each row further up, at most (k − 1) / 2 columns further right. A row
can therefore follow the row above it at a distance of `skew` columns: at step t, row r is at column t − skew · r. A map
takes W + skew · (H − 1) steps instead of H · W positions, and each step reads the weights once for all rows in flight.

The inputs of a layer are stored by step, not by column. The input `d` rows above and `j` columns to the right of a
position belongs to step t + j − skew · d for all rows in flight, so each tap of a convolution is one slice of a buffer.
Tensors are (channels, rows · batch).
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vqvae2.priors import toom_cook
from vqvae2.priors.base import Wave, WavefrontShape
from vqvae2.priors.layers import CausalConv2d, GatedResidualBlock


def choose_skew(convs: Iterable[CausalConv2d], width: int) -> int:
    """Return the smallest skew that all convolutions allow, larger if tiles of columns are computed at once."""
    convs = list(convs)
    padding = max(conv.padding for conv in convs)
    tiled = tiled_skew(padding)
    return tiled if width >= 4 * tiled and any(_can_tile(conv, width) for conv in convs) else padding + 1


def tiled_skew(padding: int) -> int:
    """Return the smallest multiple of the tile size at which all inputs of a tile are finished when it starts."""
    return -(-(toom_cook.TILE_SIZE + padding) // toom_cook.TILE_SIZE) * toom_cook.TILE_SIZE


def _can_tile(conv: CausalConv2d, width: int) -> bool:
    return conv.taps_above > 0 and toom_cook.should_tile(conv.weight_above(conv.weight), width)


class WavefrontConv2d:
    """Causal convolution: `set_input` and `output` for each step, in the order that the kernel requires.

    The taps of a step are gathered into one matrix product. If tiling is faster, it only has the taps on the current
    row, and the rows above are added for a tile of columns at once.
    """

    def __init__(self, conv: CausalConv2d, shape: WavefrontShape) -> None:
        weight = conv.weight.detach()  # with weight norm folded in
        _, in_channels, _ = weight.shape
        self.shape, self.padding, self.rows_above = shape, conv.padding, conv.rows_above
        self.bias = conv.bias.detach()[:, None]
        columns = range(-conv.padding, conv.padding + 1)
        # (steps back, rows above) of each tap, in raster order
        above = [(shape.skew * up - j, up) for up in range(conv.rows_above, 0, -1) for j in columns]
        current = [(-j, 0) for j in columns[: conv.taps_current]]
        self.tiles = None
        if above and shape.skew >= tiled_skew(conv.padding) and _can_tile(conv, shape.width):
            self.tiles = TiledRowsAbove(conv.weight_above(weight), conv.bias.detach(), shape)
            above, weight = [], weight[:, :, conv.taps_above :]
        self.taps = above + current
        self.weight = weight.transpose(1, 2).flatten(1).contiguous()  # (O, taps · I)
        self.num_slots = 1 + (self.tiles.steps_back if self.tiles else max((back for back, _ in self.taps), default=0))
        slots = weight.new_zeros(self.num_slots, in_channels, (conv.rows_above + shape.height) * shape.batch)
        self.slots = list(slots)  # inputs by step modulo num_slots; zero outside of the map

    def set_input(self, wave: Wave, values: Float[Tensor, "i rb"]) -> None:
        """Set the inputs of the rows in flight."""
        slot = self.slots[wave.step % self.num_slots]
        # Rows that were in flight when the slot was last written are now past their last column.
        stale = max(0, wave.first - self.num_slots // self.shape.skew - 1)
        slot[:, self._columns(stale, wave.first)] = 0
        slot[:, self._columns(wave.first, wave.end)] = values

    def output(self, wave: Wave, extra: Float[Tensor, "o rb"] | None = None) -> Float[Tensor, "o rb"]:
        """Return the outputs of the rows in flight, plus `extra`."""
        window = torch.cat([self.input(wave.step - back, wave.first - up, wave.end - up) for back, up in self.taps])
        offset = self.bias if self.tiles is None else self.tiles.output(wave, self)
        return torch.addmm(offset if extra is None else offset + extra, self.weight, window)

    def input(self, step: int, first: int, end: int) -> Float[Tensor, "i rb"]:
        """Return a view of the inputs of rows `first` to `end` − 1 at a recent step."""
        return self.slots[step % self.num_slots][:, self._columns(first, end)]

    def _columns(self, first: int, end: int) -> slice:
        return slice((first + self.rows_above) * self.shape.batch, (end + self.rows_above) * self.shape.batch)


class TiledRowsAbove:
    """Contribution of the rows above to a tile of columns of all rows in flight, with the Toom–Cook algorithm.

    The skew is a multiple of the tile size, so that tiles of all rows start at the same step. A tile of inputs is
    transformed once, when its last input is known, and used for the next kernel_size − 1 rows.
    """

    def __init__(self, weight: Float[Tensor, "o i r k"], bias: Float[Tensor, " o"], shape: WavefrontShape) -> None:
        _, in_channels, self.kernel_rows, kernel_size = weight.shape
        transforms = toom_cook.make_transforms(toom_cook.TILE_SIZE, kernel_size)
        self.transforms = toom_cook.Transforms(*(matrix.to(weight) for matrix in transforms))
        # (points, O, I) of each kernel row, nearest first
        self.weights = toom_cook.transform_weight(weight, self.transforms).contiguous().unbind()[::-1]
        self.bias, self.shape = bias[:, None], shape
        self.skew = shape.skew // self.transforms.tile_size  # in tiles
        self.steps_back = shape.skew + kernel_size // 2  # from the start of a tile to the first input of the latest
        num_slots = self.skew * (self.kernel_rows - 1) + 1
        columns = (self.kernel_rows + shape.height) * shape.batch
        # transformed inputs by tile step modulo the number of slots
        self.slots = list(weight.new_zeros(num_slots, self.transforms.num_points, in_channels, columns))
        self.outputs, self.first = weight.new_zeros(0), 0  # of the current tiles, and their first row

    def output(self, wave: Wave, conv: WavefrontConv2d) -> Float[Tensor, "o rb"]:
        """Return the contribution to the rows in flight, plus the bias."""
        tile, index = divmod(wave.step, self.transforms.tile_size)
        if index == 0:
            self._transform_inputs(tile, wave.step, conv)
            self._compute_outputs(tile)
        skipped = (wave.first - self.first) * self.shape.batch  # rows that end within the tile
        count = (wave.end - wave.first) * self.shape.batch
        return self.outputs[index, :, skipped : skipped + count]

    def _transform_inputs(self, tile: int, step: int, conv: WavefrontConv2d) -> None:
        first, end = self._rows(tile - self.skew)
        if first >= end:
            return
        steps = range(step - self.steps_back, step - self.steps_back + self.transforms.num_points)
        inputs = torch.stack([conv.input(back, first, end) for back in steps])
        values = (self.transforms.input @ inputs.flatten(1)).view_as(inputs)
        slot = self.slots[tile % len(self.slots)]
        slot[:, :, self._columns(first, end)] = values

    def _compute_outputs(self, tile: int) -> None:
        first, end = self._rows(tile)
        products = None
        for up, weight in enumerate(self.weights, 1):
            slot = self.slots[(tile - self.skew * (up - 1)) % len(self.slots)]
            values = slot[:, :, self._columns(first - up, end - up)]
            products = torch.bmm(weight, values) if products is None else products.baddbmm_(weight, values)
        assert products is not None
        outputs = self.transforms.output @ products.flatten(1)
        self.outputs = outputs.view(-1, *products.shape[1:]).add_(self.bias)
        self.first = first

    def _rows(self, tile: int) -> tuple[int, int]:
        """Return the first row that is at this step of tiles, and the one after the last."""
        num_tiles = self.transforms.num_tiles(self.shape.width)
        return max(0, (tile - num_tiles) // self.skew + 1), min(self.shape.height, tile // self.skew + 1)

    def _columns(self, first: int, end: int) -> slice:
        return slice((first + self.kernel_rows) * self.shape.batch, (end + self.kernel_rows) * self.shape.batch)


class WavefrontGatedResidualBlock:
    """Gated residual block without a second input."""

    def __init__(
        self, block: GatedResidualBlock, shape: WavefrontShape, condition: Float[Tensor, "p b c"] | None = None
    ) -> None:
        self.first, self.second = WavefrontConv2d(block.first, shape), WavefrontConv2d(block.second, shape)
        # (O, positions, B)
        self.condition = None
        if block.condition is not None and condition is not None:
            self.condition = block.condition.incremental()(condition).permute(2, 0, 1).contiguous()

    def step(
        self, wave: Wave, x: Float[Tensor, "c rb"], condition_positions: Int[Tensor, " r"] | None = None
    ) -> Float[Tensor, "c rb"]:
        """Return the outputs of the rows in flight, each with its position in the conditioning map."""
        self.first.set_input(wave, F.elu(x))
        self.second.set_input(wave, F.elu_(self.first.output(wave)))
        extra = None
        if self.condition is not None and condition_positions is not None:
            extra = self.condition.index_select(1, condition_positions).flatten(1)
        return F.glu(self.second.output(wave, extra), 0).add_(x)

"""The interface of priors: autoregressive models of one level's code maps, with a training and a sampling path."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqvae2.code_maps import CodeMaps, MapSpec
from vqvae2.config import Config


def _check_odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd")
    return value


OddKernelSize = Annotated[int, Field(ge=3), AfterValidator(_check_odd)]


class PriorSpec(Config):
    """Shapes of a prior's code maps and labels. Read from the code store, not configured."""

    level: MapSpec  # the maps to model
    coarser: tuple[MapSpec, ...] = ()  # the maps to condition on, finest first
    num_classes: int = 0  # number of labels, 0 without labels


class Prior(nn.Module, ABC):
    """Base class of priors: p(codes | coarser codes, label), factorized over positions in raster order.

    If `is_raster_order` is false, the order is that of `wavefront_decoder`, the only decoder of the network.
    """

    config: Any  # the config that built it
    conditioner: nn.Module | None  # None without coarser levels and labels
    digest: str | None = None  # SHA-256 of the file that the weights were loaded from
    made_from: dict[str, Any]  # digests of the artifacts it was trained on
    gradient_checkpointing = False  # recompute activations in the backward pass to save memory

    def __init__(self, spec: PriorSpec) -> None:
        super().__init__()
        self.spec, self.made_from = spec, {}

    def forward(
        self, codes: Int[Tensor, "b h w"], coarser: CodeMaps = (), labels: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b k h w"]:
        """Return the logits of all positions, for training.

        Logits depend on `codes` at earlier positions, on all of `coarser` (finest first), and on the label. If the spec
        has classes, `labels=None` gives the unconditional distribution.
        """
        return self.conditional_logits(codes, self._condition(len(codes), coarser, labels))

    @abstractmethod
    def conditional_logits(
        self, codes: Int[Tensor, "b h w"], condition: Float[Tensor, "b c h2 w2"] | None
    ) -> Float[Tensor, "b k h w"]:
        """Return the logits of all positions, given the features that the conditioner returns."""

    @property
    def is_raster_order(self) -> bool:
        """Whether positions depend on those earlier in raster order, instead of wavefront order."""
        return True

    @torch.inference_mode()
    def incremental_decoder(
        self, batch: int, coarser: CodeMaps = (), labels: Int[Tensor, " b"] | None = None
    ) -> "IncrementalDecoder":
        """Return a decoder that computes the same logits one position at a time, for sampling `batch` maps."""
        assert self.is_raster_order, "positions in wavefront order cannot be sampled in raster order"
        return self._make_incremental_decoder(batch, self._condition(batch, coarser, labels))

    def wavefront_decoder(
        self, batch: int, height: int, coarser: CodeMaps = (), labels: Int[Tensor, " b"] | None = None
    ) -> "WavefrontDecoder | None":
        """Return a decoder that computes the same logits for many rows at once, to sample the first `height` rows.

        None if this network or map has none.
        """
        return None

    @abstractmethod
    def _make_incremental_decoder(self, batch: int, condition: Tensor | None) -> "IncrementalDecoder": ...

    def _condition(self, batch: int, coarser: CodeMaps, labels: Int[Tensor, " b"] | None) -> Tensor | None:
        """Return conditioning features (B, C, h, w), None without coarser levels and labels."""
        expected = tuple(level.shape for level in self.spec.coarser)
        found = tuple(tuple(codes.shape[1:]) for codes in coarser)
        if found != expected:
            raise ValueError(f"expected coarser code maps of sizes {expected}, finest first, got {found}")
        return None if self.conditioner is None else self.conditioner(batch, coarser, labels)

    def _run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """Call a block, with gradient checkpointing (Chen et al. 2016) if enabled."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


Column = int | Tensor


class IncrementalDecoder(ABC):
    """Decoder of a batch of maps in raster order that computes each position once.

    Usage::

        for row in range(height):
            decoder.begin_row(row)
            for column in range(width):
                logits = decoder.logits(column)      # float (B, K)
                decoder.set_codes(column, codes)     # int64 (B,), sampled from the logits

    A column is an integer or an int64 tensor (1,) on the device. With a tensor, all positions run the same operations
    on the same memory, so they can be captured in one CUDA graph.
    """

    @abstractmethod
    def begin_row(self, row: int) -> None:
        """Compute the contribution of the finished rows to all columns of `row`."""

    @abstractmethod
    def logits(self, column: Column) -> Float[Tensor, "b k"]:
        """Return the logits at a column of the current row."""

    @abstractmethod
    def set_codes(self, column: Column, codes: Int[Tensor, " b"]) -> None:
        """Set the codes at a column of the current row."""


class Wave(NamedTuple):
    """Positions of one step: row r from `first` to `end` − 1 is at column `step` − skew · r."""

    step: int
    first: int
    end: int


class WavefrontShape(NamedTuple):
    """Sizes of a batch of maps in wavefront order."""

    batch: int
    height: int
    width: int
    skew: int  # columns that a row is behind the row above it

    @property
    def num_steps(self) -> int:
        """W + skew · (H − 1), the number of sequential steps."""
        return self.width + self.skew * (self.height - 1)

    def waves(self) -> Iterator[Wave]:
        """Yield the positions of each step. Steps without any, if rows are shorter than the skew, are left out."""
        for step in range(self.num_steps):
            first, end = max(0, (step - self.width) // self.skew + 1), min(self.height, step // self.skew + 1)
            if first < end:
                yield Wave(step, first, end)

    def index_tensors(self, wave: Wave, device: torch.device | str) -> tuple[Int[Tensor, " r"], Int[Tensor, " r"]]:
        """Return the rows and the columns of the positions."""
        rows = torch.arange(wave.first, wave.end, device=device)
        return rows, wave.step - self.skew * rows


class WavefrontDecoder(ABC):
    """Decoder of a batch of maps that computes one position of each of many rows in one step.

    Usage::

        for wave in decoder.shape.waves():
            logits = decoder.logits(wave)      # float (rows, B, K)
            decoder.set_codes(wave, codes)     # int64 (rows, B), sampled from the logits
    """

    shape: WavefrontShape

    @abstractmethod
    def logits(self, wave: Wave) -> Float[Tensor, "r b k"]:
        """Return the logits at the positions of a step."""

    @abstractmethod
    def set_codes(self, wave: Wave, codes: Int[Tensor, "r b"]) -> None:
        """Set the codes at the positions of a step."""

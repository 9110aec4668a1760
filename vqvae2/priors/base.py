"""What every prior is: an autoregressive model of one level's code map; one path trains, one samples."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqvae2.code_maps import CodeMaps, MapSpec
from vqvae2.config import Config


class PriorSpec(Config):
    """What a prior is of; read from the code store, never configured."""

    level: MapSpec
    coarser: tuple[MapSpec, ...] = ()  # what conditions it, finest first
    num_classes: int = 0  # number of labels; 0 where there are none


class Prior(nn.Module, ABC):
    """p(codes | coarser codes, label), one position after the other in raster order."""

    config: Any  # what built it
    digest: str | None = None  # SHA-256 of the file the weights came from
    made_from: dict[str, Any]  # digests of what it was trained on
    gradient_checkpointing = False  # whether training computes each block twice instead of keeping what is inside it

    def __init__(self, spec: PriorSpec) -> None:
        super().__init__()
        self.spec, self.made_from = spec, {}

    @abstractmethod
    def forward(
        self, codes: Int[Tensor, "b h w"], coarser: CodeMaps = (), labels: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b k h w"]:
        """Logits of every position at once, for training.

        The logits at a position depend on `codes` at earlier positions only, on all of `coarser` (finest first), and on
        the label; where the spec has classes, `labels=None` asks for the label-free distribution.
        """

    @abstractmethod
    def incremental_decoder(
        self, batch: int, coarser: CodeMaps = (), labels: Int[Tensor, " b"] | None = None
    ) -> "IncrementalDecoder":
        """The same logits one position at a time, for sampling, with folded copies of the weights."""

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        """One block of the forward pass, with gradient checkpointing (Chen et al. 2016) where asked for."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _check_coarser(self, coarser: CodeMaps) -> None:
        expected = tuple(level.shape for level in self.spec.coarser)
        found = tuple(tuple(codes.shape[1:]) for codes in coarser)
        if found != expected:
            raise ValueError(f"expected coarser code maps of sizes {expected}, finest first, got {found}")


Column = int | Tensor


class IncrementalDecoder(ABC):
    """A walk over the positions of one batch of maps in raster order, computing each position once.

    for row in range(height):
        steps.begin_row(row)
        for column in range(width):
            logits = steps.logits(column)       # float (B, K)
            steps.set_codes(column, codes)           # int64 (B,), what was chosen there

    A column is a number, or an int64 tensor (1,) on the device: with it a position is the same operations on the same
    memory wherever it is, so that a GPU can record it once and replay it.
    """

    @abstractmethod
    def begin_row(self, row: int) -> None:
        """Evaluate all that finished rows contribute to this row, for every column at once."""

    @abstractmethod
    def logits(self, column: Column) -> Float[Tensor, "b k"]:
        """Logits at this column of the current row."""

    @abstractmethod
    def set_codes(self, column: Column, codes: Int[Tensor, " b"]) -> None:
        """Put the codes chosen at this column in place."""


@torch.inference_mode()
def incremental_logits(
    prior: Prior,
    codes: Int[Tensor, "b h w"],
    coarser: CodeMaps = (),
    labels: Int[Tensor, " b"] | None = None,
    as_tensors: bool = False,
) -> Float[Tensor, "b k h w"]:
    """The logits of `forward`, found by walking: for checking that the two paths agree.

    `as_tensors` gives columns as they are on a GPU.
    """
    batch, height, width = codes.shape
    steps = prior.incremental_decoder(batch, coarser, labels)
    rows = []
    for row in range(height):
        steps.begin_row(row)
        columns = []
        for number in range(width):
            column = torch.tensor([number]) if as_tensors else number
            columns.append(steps.logits(column).clone())
            steps.set_codes(column, codes[:, row, number])
        rows.append(torch.stack(columns, -1))
    return torch.stack(rows, 2)

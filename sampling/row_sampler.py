"""The positions of a row, one after the other: a GPU records one of them as a graph and replays it for the others."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vqvae2.code_maps import MapSpec
from vqvae2.priors.base import Column, IncrementalDecoder

Chooser = Callable[[Float[Tensor, "b k"], Float[Tensor, "b k"]], Int[Tensor, " b"]]  # logits, noise → codes


class RowSampler:
    """Walks along the rows of a batch of maps. All that a position reads or writes stays where it is in memory."""

    def __init__(
        self, steps: IncrementalDecoder, choose: Chooser, batch: int, level: MapSpec, device: torch.device
    ) -> None:
        self.steps, self.choose, self.width = steps, choose, level.width
        self.noise = torch.empty(level.width, batch, level.codebook_size, device=device)
        self.codes = torch.zeros(batch, level.width, dtype=torch.int64, device=device)
        self.keep = torch.zeros(batch, level.width, dtype=torch.bool, device=device)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.recording: Any = None
        self.recorded = device.type == "cuda"

    def incremental(
        self,
        row: int,
        noise: Float[Tensor, "w b k"],
        codes: Int[Tensor, "b w"],
        keep: Bool[Tensor, "b w"] | None = None,
    ) -> Int[Tensor, "b w"]:
        """The codes of a row: those of `codes` where `keep` is true, sampled ones elsewhere."""
        if self.recorded and self.recording is None:
            self.recording = record(self._next)  # before the first row: it walks a few positions, of no meaning
        self.steps.begin_row(row)
        self.noise.copy_(noise, non_blocking=True)
        self.codes.copy_(codes)
        if keep is not None:
            self.keep.copy_(keep)
        if not self.recorded:
            for column in range(self.width):
                self._at(column)
            return self.codes
        self.column.zero_()
        for _ in range(self.width):
            self.recording.replay()
        return self.codes

    def _at(self, column: Column) -> None:
        logits = self.steps.logits(column)
        chosen = self.choose(logits, self.noise[column].view(logits.shape))
        chosen = torch.where(self.keep[:, column].flatten(), self.codes[:, column].flatten(), chosen)
        self.steps.set_codes(column, chosen)
        if isinstance(column, Tensor):
            self.codes.index_copy_(1, column, chosen[:, None])
        else:
            self.codes[:, column] = chosen

    def _next(self) -> None:
        self._at(self.column)
        self.column.add_(1).remainder_(self.width)


def record(work: Callable[[], None]) -> Any:
    """A CUDA graph of the work; it is done a few times before, as recording demands."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph

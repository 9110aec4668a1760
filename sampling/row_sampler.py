"""Sample one row of a code map, position by position. On a GPU, one position is captured as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sampling.logits import sample_codes
from sampling.params import CodeSamplingParams
from vqvae2.code_maps import MapSpec
from vqvae2.priors.base import Column, IncrementalDecoder


class RowSampler:
    """Samples the rows of a batch of code maps.

    All tensors that a position reads or writes keep their addresses, so that one captured position can be replayed for
    every column.
    """

    def __init__(
        self,
        decoder: IncrementalDecoder,
        params: CodeSamplingParams,
        batch: int,
        level: MapSpec,
        device: torch.device,
    ) -> None:
        self.decoder, self.params, self.width = decoder, params, level.width
        self.uniform = torch.zeros(batch, level.width, device=device)
        self.codes = torch.zeros(batch, level.width, dtype=torch.int64, device=device)
        self.keep = torch.zeros(batch, level.width, dtype=torch.bool, device=device)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.graph: Any = None
        self.use_graph = device.type == "cuda"

    def sample(
        self,
        row: int,
        uniform: Float[Tensor, "b w"],
        codes: Int[Tensor, "b w"],
        keep: Bool[Tensor, "b w"] | None = None,
    ) -> Int[Tensor, "b w"]:
        """Return the codes of a row: those of `codes` if `keep` is true, sampled codes otherwise.

        Args:
            uniform: Variates in [0, 1).
        """
        if self.use_graph and self.graph is None:
            # Before the first row, because the warmup writes to the buffers.
            self.graph = capture(self._next_position, self.codes.device)
        self.decoder.begin_row(row)
        self.uniform.copy_(uniform)
        self.codes.copy_(codes)
        if keep is not None:
            self.keep.copy_(keep)
        if not self.use_graph:
            for column in range(self.width):
                self._sample_position(column)
            return self.codes
        self.column.zero_()
        for _ in range(self.width):
            self.graph.replay()
        return self.codes

    def _sample_position(self, column: Column) -> None:
        logits = self.decoder.logits(column)
        sampled = sample_codes(logits, self.uniform[:, column].flatten(), self.params)
        sampled = torch.where(self.keep[:, column].flatten(), self.codes[:, column].flatten(), sampled)
        self.decoder.set_codes(column, sampled)
        if isinstance(column, Tensor):
            self.codes.index_copy_(1, column, sampled[:, None])
        else:
            self.codes[:, column] = sampled

    def _next_position(self) -> None:
        self._sample_position(self.column)
        self.column.add_(1).remainder_(self.width)


def capture(work: Callable[[], None], device: torch.device) -> Any:
    """Capture `work` as a CUDA graph, after a few warmup calls, which capturing requires."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one of a DataLoader that pins memory, may call CUDA during the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
    return graph

"""How a codebook is used: which codes occur, and how evenly."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vqvae2.distributed import all_reduce_sum
from vqvae2.errors import UserError


class CodebookUsage:
    """Streaming histogram of the codes of one level.

    Batches go in, integers in [0, K) of any shape:

        usage = CodebookUsage(512)
        for maps in batches:
            usage.update(maps)
        usage.all_reduce()              # on several processes
        usage.usage, usage.perplexity
    """

    def __init__(self, codes: int, device: torch.device | str = "cpu") -> None:
        if codes < 1:
            raise UserError(f"a codebook of {codes} codes; expected at least 1")
        self.counts = torch.zeros(codes, dtype=torch.int64, device=device)

    def update(self, codes: Int[Tensor, "..."]) -> None:
        """Count codes, integers in [0, K) of any shape; UserError where one lies outside."""
        size = len(self.counts)
        if codes.numel() == 0:
            return
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise UserError(f"codes of type {codes.dtype}; expected integers")
        flat = codes.detach().to(self.counts.device, torch.int64).flatten()
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= size:
            raise UserError(f"codes from {low} to {high}; this codebook has 0 to {size - 1}")
        self.counts += torch.bincount(flat, minlength=size)

    def all_reduce(self) -> None:
        """Add up the histograms of all processes, on every process; nothing to do on one. Call it once, at the end."""
        self.counts = all_reduce_sum(self.counts)

    @property
    def total(self) -> int:
        """How many codes were counted."""
        return int(self.counts.sum())

    @property
    def usage(self) -> float:
        """Share of the codebook that occurs at all, in [0, 1]."""
        return float((self.counts > 0).double().mean())

    @property
    def entropy(self) -> float:
        """Entropy of the histogram in nats, in [0, ln K]: what a prior pays per code if it knows frequencies alone.

        NaN where nothing was counted.
        """
        counts = self.counts.cpu().numpy().astype(np.float64)
        if not counts.any():
            return float("nan")
        share = counts[counts > 0] / counts.sum()
        return float(max(-(share * np.log(share)).sum(), 0.0))

    @property
    def perplexity(self) -> float:
        """exp(entropy), in [1, K]: how many evenly used codes would carry as much. NaN where nothing was counted."""
        return float(np.exp(self.entropy))

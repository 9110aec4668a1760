"""Codebook usage and perplexity."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vqvae2.distributed import all_reduce_sum
from vqvae2.errors import UserError


class CodebookUsage:
    """Streaming histogram of the codes of one level.

    >>> usage = CodebookUsage(codebook_size=4)
    >>> usage.update(torch.tensor([[0, 1], [0, 1]]))
    >>> usage.all_reduce()  # sum over ranks
    >>> usage.usage, round(usage.perplexity, 6)
    (0.5, 2.0)
    """

    def __init__(self, codebook_size: int, device: torch.device | str = "cpu") -> None:
        if codebook_size < 1:
            raise UserError(f"a codebook needs at least 1 code, got {codebook_size}")
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def update(self, codes: Int[Tensor, "..."]) -> None:
        """Count codes, integers in [0, K) of any shape.

        Raises:
            UserError: If codes are not integers or are out of range.
        """
        codebook_size = len(self.counts)
        if codes.numel() == 0:
            return
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise UserError(f"codes must be integers, got {codes.dtype}")
        flat = codes.detach().to(self.counts.device, torch.int64).flatten()
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= codebook_size:
            raise UserError(f"codes must be in 0 to {codebook_size - 1}, got {low} to {high}")
        self.counts += torch.bincount(flat, minlength=codebook_size)

    def all_reduce(self) -> None:
        """Sum the histograms of all ranks. Call once, after the last update."""
        self.counts = all_reduce_sum(self.counts)

    @property
    def total(self) -> int:
        """Number of counted codes."""
        return int(self.counts.sum())

    @property
    def usage(self) -> float:
        """Fraction of the codebook that occurs at least once, in [0, 1]."""
        return float((self.counts > 0).double().mean())

    @property
    def entropy(self) -> float:
        """Entropy of the code frequencies in nats, in [0, ln K]. NaN if nothing was counted."""
        counts = self.counts.cpu().numpy().astype(np.float64)
        if not counts.any():
            return float("nan")
        frequencies = counts[counts > 0] / counts.sum()
        return float(max(-(frequencies * np.log(frequencies)).sum(), 0.0))

    @property
    def perplexity(self) -> float:
        """exp(entropy), in [1, K]: the effective number of codes. NaN if nothing was counted."""
        return float(np.exp(self.entropy))

"""Inception score (Salimans et al. 2016, arXiv 1606.03498): exp E KL(p(y|x) ‖ p(y)).

The mean KL divergence of a split is mean Σ p log p − Σ p̄ log p̄. Two sums per split are enough to compute it, so no
logits are stored.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqvae2.distributed import all_reduce_sum
from vqvae2.errors import UserError
from vqvae2.metrics import float64_device


class InceptionScoreResult(NamedTuple):
    """Mean and population standard deviation of the score over splits. The mean is in [1, number of classes]."""

    mean: float
    std: float


class InceptionScore:
    """Streaming Inception score of `count` images in `splits` random splits.

    The defaults assign images to splits as torch-fidelity does, and the scores agree up to rounding.

    Raises:
        UserError: If there are fewer images than splits.
    """

    def __init__(
        self, count: int, splits: int = 10, seed: int = 2020, classes: int = 1008, device: torch.device | str = "cpu"
    ) -> None:
        if not 1 <= splits <= count:
            raise UserError(f"Inception score: {splits} splits need at least as many images, got {count}")
        self._device = float64_device(device)
        order = np.random.RandomState(seed).permutation(count)
        split_of = np.empty(count, np.int64)
        for split in range(splits):
            split_of[order[split * count // splits : (split + 1) * count // splits]] = split
        self._split_of = torch.from_numpy(split_of)
        self._counts = torch.zeros(splits, dtype=torch.float64, device=self._device)
        self._negentropy = torch.zeros(splits, dtype=torch.float64, device=self._device)  # Σ_x Σ_y p log p
        self._marginal = torch.zeros(splits, classes, dtype=torch.float64, device=self._device)  # Σ_x p

    def update(self, logits: Float[Tensor, "n classes"], indices: Int[Tensor, "n"]) -> None:
        """Add the logits of a batch of images. `indices` are their indices in [0, count)."""
        log_p = logits.detach().to(self._device).double().log_softmax(1)
        p = log_p.exp()
        split = self._split_of[indices.cpu()].to(self._device)
        self._counts.index_add_(0, split, torch.ones_like(p[:, 0]))
        self._negentropy.index_add_(0, split, torch.xlogy(p, p).sum(1))
        self._marginal.index_add_(0, split, p)

    def all_reduce(self) -> None:
        """Sum the statistics of all ranks. Call once, after the last update."""
        for sums in (self._counts, self._negentropy, self._marginal):
            all_reduce_sum(sums)

    def compute(self) -> InceptionScoreResult:
        """Return the score.

        Raises:
            UserError: If fewer or more than `count` images were added.
        """
        if int(self._counts.sum()) != len(self._split_of):
            raise UserError(f"Inception score: expected {len(self._split_of)} images, got {int(self._counts.sum())}")
        marginal = self._marginal / self._counts[:, None]
        divergence = self._negentropy / self._counts - torch.xlogy(marginal, marginal).sum(1)
        scores = divergence.exp().cpu().numpy()
        return InceptionScoreResult(float(scores.mean()), float(scores.std()))


def inception_score(logits: Float[Tensor, "n classes"], splits: int = 10, seed: int = 2020) -> InceptionScoreResult:
    """Return the Inception score of logits (N, classes)."""
    score = InceptionScore(len(logits), splits, seed, logits.shape[1], logits.device)
    score.update(logits, torch.arange(len(logits)))
    return score.compute()

"""Kernel Inception distance (Bińkowski et al. 2018, arXiv 1801.01401): unbiased MMD² with a polynomial kernel."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vqvae2.errors import UserError


@dataclass(frozen=True)
class KernelInceptionDistance:
    """Mean and population standard deviation over `subsets` of `subset_size` images. Values can be negative."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def kernel_inception_distance(
    generated: Float[Tensor, "n d"],
    reference: Float[Tensor, "m d"],
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> KernelInceptionDistance:
    """Compute KID with the kernel (x·y / d + 1)³ over random subsets, in float64.

    Subsets are sampled as in torch-fidelity, so the same features and seed give the same result. Subsets are smaller
    than `subset_size` if either side has fewer images.

    Raises:
        UserError: If the dimensions differ or a side has fewer than two images.
    """
    if generated.ndim != 2 or reference.ndim != 2 or generated.shape[1] != reference.shape[1]:
        raise UserError(
            f"KID: expected features (N, D) and (M, D), got {tuple(generated.shape)} and {tuple(reference.shape)}"
        )
    size = min(subset_size, len(generated), len(reference))
    if size < 2:
        raise UserError(f"KID needs at least 2 images per side, got {size}")
    if subsets < 1:
        raise UserError(f"KID needs at least 1 subset, got {subsets}")
    rng = np.random.RandomState(seed)
    distances = np.empty(subsets)
    for index in range(subsets):
        x, y = (
            features[torch.from_numpy(rng.choice(len(features), size, replace=False)).to(features.device)]
            for features in (generated, reference)
        )
        distances[index] = squared_mmd(x, y)
    return KernelInceptionDistance(float(distances.mean()), float(distances.std()), subsets, size)


def squared_mmd(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy of two samples of equal size."""
    if x.device.type == "mps":  # no float64
        x, y = x.cpu(), y.cpu()
    x, y, n = x.double(), y.double(), len(x)
    within = sum(float(kernel.sum() - kernel.trace()) for kernel in (_kernel(x, x), _kernel(y, y)))
    return within / (n * (n - 1)) - 2 * float(_kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # `pow` is ten times slower

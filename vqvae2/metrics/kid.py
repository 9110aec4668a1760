"""Kernel Inception distance (Bińkowski et al. 2018, arXiv 1801.01401): unbiased MMD² with a polynomial kernel."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vqvae2.errors import UserError


@dataclass(frozen=True)
class KernelInceptionDistance:
    """Mean and population standard deviation over `subsets` of `subset_size` images; values below 0 are valid."""

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
    """KID with the kernel (x·y / d + 1)³ of the paper, over random subsets of both sides.

    Subsets are drawn as torch-fidelity draws them, so equal features and seed give its number; where a side has fewer
    than `subset_size` images the subsets are of its size. Computed in float64. Raises UserError where the dimensions
    differ or a side has fewer than two images.
    """
    if generated.ndim != 2 or reference.ndim != 2 or generated.shape[1] != reference.shape[1]:
        raise UserError(f"features of shapes {tuple(generated.shape)} and {tuple(reference.shape)}; expected (N, D)")
    size = min(subset_size, len(generated), len(reference))
    if size < 2 or subsets < 1:
        raise UserError(f"{subsets} subsets of {size} images; KID needs at least one of at least two images")
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
    """Unbiased estimate of the squared maximum mean discrepancy between two samples of equal size."""
    if x.device.type == "mps":  # has no float64
        x, y = x.cpu(), y.cpu()
    x, y, n = x.double(), y.double(), len(x)
    within = sum(float(kernel.sum() - kernel.trace()) for kernel in (_kernel(x, x), _kernel(y, y)))
    return within / (n * (n - 1)) - 2 * float(_kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # pow goes through exp and log, ten times slower

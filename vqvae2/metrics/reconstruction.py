"""Reconstruction metrics per image: MSE, PSNR and SSIM (Wang et al. 2004).

Images are float32 (N, C, H, W) in [-1, 1]. They are compared as 8-bit levels 0 … 255 (`to_8bit_levels`), so that
metrics of tensors and of the PNG files written from them are the same.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vqvae2.distributed import all_reduce_sum
from vqvae2.errors import UserError
from vqvae2.metrics import float64_device

DATA_RANGE = 255.0
# Lower bound of the MSE in squared levels, the variance of rounding to 8 bits. Without it, a single perfectly
# reconstructed image would make the mean PSNR infinite. It bounds PSNR to 58.9 dB.
_MIN_MSE = 1 / 12
SSIM_WINDOW, _SIGMA = 11, 1.5  # pixels


def to_8bit_levels(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Convert images in [-1, 1] to integers from 0 to 255 in float32. Values outside of the range are clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255)


def mse(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"]) -> Float[Tensor, "n"]:
    """Return the mean squared error per image."""
    _check_shapes(a, b)
    return (a - b).square().flatten(1).mean(1)


def psnr(
    a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"], data_range: float = DATA_RANGE
) -> Float[Tensor, "n"]:
    """Return the peak signal-to-noise ratio per image in dB, 10 log₁₀(range² / MSE). Infinite for equal images."""
    return 10 * torch.log10(data_range**2 / mse(a, b))


def ssim(
    a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"], data_range: float = DATA_RANGE
) -> Float[Tensor, "n"]:
    """Return the structural similarity per image, in [-1, 1]: the mean over channels and valid window positions.

    Uses the constants of the paper: a Gaussian window of 11 × 11 with σ = 1.5, K = (0.01, 0.03), and the population
    covariance. scikit-image computes the same with gaussian_weights=True, sigma=1.5, use_sample_covariance=False.

    Raises:
        UserError: If images are smaller than the window or the shapes differ.
    """
    _check_shapes(a, b)
    n, _, height, width = a.shape
    if min(height, width) < SSIM_WINDOW:
        raise UserError(f"SSIM: images must be at least {SSIM_WINDOW}×{SSIM_WINDOW} pixels, got {height}×{width}")
    if n == 0:
        return a.new_zeros(0)
    dtype = torch.float64 if a.device.type != "mps" else torch.float32
    offsets = torch.arange(SSIM_WINDOW, device=a.device, dtype=dtype) - SSIM_WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    window = (window / window.sum()).to(a.dtype)

    def blur(images: Tensor) -> Tensor:
        flat = images.reshape(-1, 1, height, width)  # channels as batch, for an ordinary convolution
        return F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    # Variance does not depend on the origin, and centered values lose fewer digits in float32.
    middle = data_range / 2
    a0, b0 = a - middle, b - middle
    # (5 N C, 1, H − 10, W − 10)
    mean_a, mean_b, square_a, square_b, product = blur(torch.cat((a0, b0, a0 * a0, b0 * b0, a0 * b0))).chunk(5)
    variance_a, variance_b = square_a - mean_a**2, square_b - mean_b**2
    covariance = product - mean_a * mean_b
    mean_a, mean_b = mean_a + middle, mean_b + middle
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return similarity.reshape(n, -1).mean(1)


@dataclass(frozen=True)
class ReconstructionMetrics:
    """Means over images. `mse` is of images scaled to [0, 1], `psnr` is in dB, `ssim` in [-1, 1]."""

    count: int
    mse: float
    psnr: float
    ssim: float


class ReconstructionStatistics:
    """Streaming means of the metrics per image, in float64."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=float64_device(device))  # count, MSE, PSNR, SSIM

    @torch.no_grad()
    def update(self, originals: Float[Tensor, "n c h w"], reconstructions: Float[Tensor, "n c h w"]) -> None:
        """Add a batch of images in [-1, 1] and their reconstructions.

        Raises:
            UserError: If the shapes differ or images are smaller than 11 × 11 pixels.
        """
        a, b = to_8bit_levels(originals), to_8bit_levels(reconstructions)
        error = mse(a, b)
        decibels = 10 * torch.log10(DATA_RANGE**2 / error.clamp(min=_MIN_MSE))
        values = torch.stack((torch.ones_like(error), error / DATA_RANGE**2, decibels, ssim(a, b)))
        self._sums += values.to(self._sums.device).double().sum(1)

    def all_reduce(self) -> None:
        """Sum the statistics of all ranks. Call once, after the last update."""
        self._sums = all_reduce_sum(self._sums)

    def compute(self) -> ReconstructionMetrics:
        """Return the means.

        Raises:
            UserError: If no images were added.
        """
        count, *sums = self._sums.tolist()
        if not count:
            raise UserError("reconstruction metrics: no images; need at least one pair")
        return ReconstructionMetrics(int(count), *(value / count for value in sums))


def compare_images(
    originals: Float[Tensor, "n c h w"], reconstructions: Float[Tensor, "n c h w"]
) -> ReconstructionMetrics:
    """Return the metrics of one batch. See `ReconstructionStatistics.update`."""
    statistics = ReconstructionStatistics(originals.device)
    statistics.update(originals, reconstructions)
    return statistics.compute()


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise UserError(f"expected two equal shapes (N, C, H, W), got {tuple(a.shape)} and {tuple(b.shape)}")

"""How close reconstructions are to their originals: MSE, PSNR, and SSIM (Wang et al. 2004), image by image.

Images are float32 (N, C, H, W) in [-1, 1]. They are compared as the 8-bit levels 0 … 255 that a PNG of them holds, so
that a number measured on tensors is the number measured on files; `levels` is the one place where that is done.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vqvae2.distributed import all_reduce_sum
from vqvae2.errors import UserError

DATA_RANGE = 255.0
# PSNR of identical images is infinite, and one black image would make the mean so. The variance of rounding to 8 bits,
# in squared levels, is the smallest error that 8-bit images can show: PSNR ends at 58.9 dB.
_ROUNDING = 1 / 12
_WINDOW, _SIGMA = 11, 1.5


def levels(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Images in [-1, 1] as 8-bit levels: whole numbers from 0 to 255, in float32; values beyond are clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255)


def mse(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"]) -> Float[Tensor, "n"]:
    """Mean squared error per image, in the square of the images' unit."""
    _same_shape(a, b)
    return (a - b).square().flatten(1).mean(1)


def psnr(
    a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"], data_range: float = DATA_RANGE
) -> Float[Tensor, "n"]:
    """Peak signal-to-noise ratio per image in dB, 10 log₁₀(range² / MSE); infinite for equal images."""
    return 10 * torch.log10(data_range**2 / mse(a, b))


def ssim(
    a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"], data_range: float = DATA_RANGE
) -> Float[Tensor, "n"]:
    """Structural similarity per image, in [-1, 1], mean over channels and over places where the window fits.

    Gaussian window of 11 × 11, σ = 1.5, K = (0.01, 0.03), population covariance: the constants of the paper, and what
    scikit-image computes with gaussian_weights=True, sigma=1.5, use_sample_covariance=False. Raises UserError for
    images smaller than the window.
    """
    _same_shape(a, b)
    n, _, height, width = a.shape
    if min(height, width) < _WINDOW:
        raise UserError(f"images of {height}×{width} pixels; SSIM needs at least {_WINDOW}×{_WINDOW}")
    if n == 0:
        return a.new_zeros(0)
    place = torch.arange(_WINDOW, device=a.device, dtype=torch.float64 if a.device.type != "mps" else torch.float32)
    window = torch.exp(-((place - _WINDOW // 2) ** 2) / (2 * _SIGMA**2))
    window = (window / window.sum()).to(a.dtype)

    def blur(images: Tensor) -> Tensor:
        flat = images.reshape(-1, 1, height, width)  # every plane by itself: one plain convolution
        return F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    # Variance does not depend on the origin; about mid-grey float32 loses fewer digits of it.
    middle = data_range / 2
    a0, b0 = a - middle, b - middle
    # Planes of one kind lie together: (5 N C, 1, H − 10, W − 10)
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
    """Means over images. `mse` is in squared units of [0, 1] (levels / 255), `psnr` in dB, `ssim` in [-1, 1]."""

    count: int
    mse: float
    psnr: float
    ssim: float


class ReconstructionStatistics:
    """Streaming means of the per-image errors, in float64."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        device = "cpu" if torch.device(device).type == "mps" else device  # MPS has no float64
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)  # count, MSE, PSNR, SSIM

    @torch.no_grad()
    def update(self, originals: Float[Tensor, "n c h w"], reconstructions: Float[Tensor, "n c h w"]) -> None:
        """Take in a batch of pairs in [-1, 1]; UserError where shapes differ or images are below 11 × 11 pixels."""
        a, b = levels(originals), levels(reconstructions)
        error = mse(a, b)
        decibels = 10 * torch.log10(DATA_RANGE**2 / error.clamp(min=_ROUNDING))
        values = torch.stack((torch.ones_like(error), error / DATA_RANGE**2, decibels, ssim(a, b)))
        self._sums += values.to(self._sums.device).double().sum(1)

    def all_reduce(self) -> None:
        """Add up over all processes, on every process; nothing to do on one. Call it once, at the end."""
        self._sums = all_reduce_sum(self._sums)

    def compute(self) -> ReconstructionMetrics:
        """The means so far; UserError where nothing was compared."""
        count, *sums = self._sums.tolist()
        if not count:
            raise UserError("no images to compare: reconstruction errors need at least one pair")
        return ReconstructionMetrics(int(count), *(value / count for value in sums))


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise UserError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)}; expected two equal (N, C, H, W)")

"""What every quantizer is: features in, integer codes and quantized features out; and how gradients pass through it."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class QuantizerOutput(NamedTuple):
    """What a quantizer makes of features (B, D, *spatial)."""

    quantized: Float[Tensor, "b d *spatial"]  # quantized features, float32; gradients reach the input through them
    codes: Int[Tensor, "b *spatial"]  # int64, in [0, number of codes)
    loss: Float[Tensor, ""]  # what training adds to the reconstruction term, weights applied
    loss_terms: dict[str, Float[Tensor, ""]]  # the parts of the loss, unweighted, for the log


class Quantizer(nn.Module, ABC):
    """Maps each feature vector to one of `codes` integers. Works in float32 whatever the mixed precision.

    Example: a 64-dimensional quantizer of 512 codes maps features (8, 64, 32, 32) to values of the same shape and codes
    (8, 32, 32) in [0, 512).
    """

    codebook_size: int
    code_dim: int

    @abstractmethod
    def forward(self, features: Float[Tensor, "b d *spatial"]) -> QuantizerOutput:
        """Quantize features; raises ValueError where their width is not `dim`."""

    def pass_through(self, features: Float[Tensor, "b d *spatial"]) -> QuantizerOutput:
        """Features as they are, for the start of training; the codes are all 0 and mean nothing."""
        self._check_width(features)
        # Every parameter takes part in every step: processes that share a gradient wait for all of them.
        untouched = sum((parameter.sum() * 0 for parameter in self.parameters()), features.new_zeros(()).float())
        codes = torch.zeros(features.shape[:1] + features.shape[2:], dtype=torch.int64, device=features.device)
        return QuantizerOutput(features.float(), codes, untouched, {})

    @abstractmethod
    def lookup(self, codes: Int[Tensor, "b *spatial"]) -> Float[Tensor, "b d *spatial"]:
        """The quantized features that codes stand for."""

    def update(self) -> None:
        """Take in what the forward passes since the last call have seen; call it once after every optimizer step."""

    def _check_width(self, features: Tensor) -> None:
        if features.ndim < 2 or features.shape[1] != self.code_dim:
            raise ValueError(f"expected features (batch, {self.code_dim}, ...), got {tuple(features.shape)}")


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized` with the gradient of `latents` (van den Oord et al. 2017, section 3.1)."""
    return latents + (quantized - latents).detach()


def rotation_trick(latents: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized`; its gradient is rotated and scaled back onto `latents` along the last dimension.

    The rotation trick (Fifty et al. 2024, arXiv 2410.06424, eq. 4): both directions enter as constants, so the gradient
    keeps its angle to the quantized vector instead of being copied.
    """
    source = F.normalize(latents.detach(), dim=-1)
    target = F.normalize(quantized.detach(), dim=-1)
    middle = F.normalize(source + target, dim=-1)
    scale = quantized.detach().norm(dim=-1, keepdim=True) / latents.detach().norm(dim=-1, keepdim=True).clamp_min(1e-6)
    along_middle = (latents * middle).sum(-1, keepdim=True)
    along_source = (latents * source).sum(-1, keepdim=True)
    return scale * (latents - 2 * along_middle * middle + 2 * along_source * target)

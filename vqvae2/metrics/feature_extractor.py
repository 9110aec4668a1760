"""The interface of networks whose features metrics compare."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vqvae2.errors import UserError


class WeightsUnavailableError(UserError):
    """Pretrained weights, or the package that contains them, were not given and cannot be found or downloaded."""


class FeatureOutput(NamedTuple):
    """Output of a feature extractor. `logits` is None unless requested."""

    features: Float[Tensor, "n d"]
    logits: Float[Tensor, "n k"] | None = None


class FeatureExtractor(nn.Module, ABC):
    """Network from uint8 RGB images of any size to feature vectors, in evaluation mode."""

    name: str
    dims: int  # number of features
    weights_digest: str  # SHA-256 of the weights file
    is_standard: bool  # whether the weights are the published ones

    @property
    def device(self) -> torch.device:
        """Device of the weights. Images are moved to it."""
        return next(self.parameters()).device

    @abstractmethod
    def forward(self, images: UInt8[Tensor, "n 3 h w"], logits: bool = False) -> FeatureOutput:
        """Return features (N, dims), and logits if requested.

        Raises:
            UserError: If the images are not uint8 or do not have three channels.
        """


def check_images(images: Tensor) -> None:
    """Raise UserError if images are not uint8 RGB (N, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise UserError(f"expected uint8 RGB images (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")

"""The interface of quantizers."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

MAX_CODES = 2**24  # of one codebook


class QuantizerOutput(NamedTuple):
    """Output of a quantizer for features (B, D, *spatial)."""

    quantized: Float[Tensor, "b d *spatial"]  # float32; gradients pass through to the input features
    codes: Int[Tensor, "b *spatial"]  # int64, in [0, codebook_size)
    loss: Float[Tensor, ""]  # weighted quantization loss, to add to the reconstruction loss
    loss_terms: dict[str, Float[Tensor, ""]]  # unweighted, detached parts of the loss, for logging


class Quantizer(nn.Module, ABC):
    """Base class of quantizers, which map each feature vector to one of `codebook_size` integers.

    Quantizers compute in float32, also under autocast.
    """

    codebook_size: int
    code_dim: int

    @abstractmethod
    def forward(self, features: Float[Tensor, "b d *spatial"]) -> QuantizerOutput:
        """Quantize features.

        Raises:
            ValueError: If the features do not have `code_dim` channels.
        """

    def pass_through(self, features: Float[Tensor, "b d *spatial"]) -> QuantizerOutput:
        """Return the features unquantized, with placeholder codes of 0. Used for the first steps of training."""
        self._check_features(features)
        # DDP expects every parameter to receive a gradient in every step.
        zero = sum((parameter.sum() * 0 for parameter in self.parameters()), features.new_zeros(()).float())
        codes = torch.zeros(features.shape[:1] + features.shape[2:], dtype=torch.int64, device=features.device)
        return QuantizerOutput(features.float(), codes, zero, {})

    @abstractmethod
    def lookup(self, codes: Int[Tensor, "b *spatial"]) -> Float[Tensor, "b d *spatial"]:
        """Return the quantized features of codes."""

    def update(self) -> None:
        """Update the codebook from the forward passes since the last call. Call once after every optimizer step."""

    def _check_features(self, features: Tensor) -> None:
        if features.ndim < 2 or features.shape[1] != self.code_dim:
            raise ValueError(f"expected features (batch, {self.code_dim}, ...), got {tuple(features.shape)}")

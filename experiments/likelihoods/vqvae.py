"""The VQ-VAE with a uniform prior over its codes (van den Oord et al. 2017, section 3.2)."""

import math
from typing import ClassVar

from jaxtyping import Float, UInt8
from torch import Tensor

from experiments.likelihoods.networks import LatentModel, NetworkConfig
from vqvae2.quantizers import QuantizerConfig, QuantizerOutput


class VQVAE(LatentModel):
    """Model with `latents` codes per position of the latent map, all of the same codebook.

    >>> import torch
    >>> from vqvae2.quantizers import EMAConfig
    >>> model = VQVAE(NetworkConfig(channels=8), 3, 2, EMAConfig(codebook_size=16, code_dim=4))
    >>> model.bound(torch.zeros(5, 3, 32, 32, dtype=torch.uint8)).shape
    torch.Size([5])
    """

    kind: ClassVar[str] = "vq-vae"

    def __init__(self, config: NetworkConfig, image_channels: int, latents: int, quantizer: QuantizerConfig) -> None:
        width = latents * quantizer.code_dim
        super().__init__(config, image_channels, width, width)
        self.latents, self.quantizer = latents, quantizer.build()

    def objective(
        self, images: UInt8[Tensor, "b c h w"], quantized: bool = True
    ) -> tuple[Float[Tensor, " b"], dict[str, Tensor]]:
        """Return the bound minus the loss of the quantizer (eq. 3), which is weighted like the mean over all values."""
        quantization = self.quantize(images) if quantized else self.quantizer.pass_through(self.features(images))
        weight = images[0].numel()
        return self._bound(quantization, images) - weight * quantization.loss, quantization.loss_terms

    def bound(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """Return log p(x | z_q(x)) − N log K for N codes of a codebook of size K."""
        return self._bound(self.quantize(images), images)

    def log_weights(self, images: UInt8[Tensor, "b c h w"], samples: int) -> Float[Tensor, "k b"]:
        """Return the bound as the weight of every sample, because q(z_q(x) | x) = 1."""
        return self.bound(images).expand(samples, -1)

    def reconstruct(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.likelihood_parameters(self.decoder_inputs(self.quantize(images).quantized))[0]

    def quantize(self, images: UInt8[Tensor, "b c h w"]) -> QuantizerOutput:
        """Return codes (B, n, h, w) and quantized features (B, D, n, h, w)."""
        return self.quantizer(self.features(images))

    def features(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b d n h2 w2"]:
        """Return the features before quantization."""
        return self.encode(images).unflatten(1, (self.latents, -1)).transpose(1, 2)

    def decoder_inputs(self, quantized: Float[Tensor, "b d n h2 w2"]) -> Float[Tensor, "b n*d h2 w2"]:
        """Return the vectors of all codes of a position, concatenated."""
        return quantized.transpose(1, 2).flatten(1, 2).to(self.head.weight.dtype)

    def _bound(self, quantization: QuantizerOutput, images: Tensor) -> Tensor:
        log_prior = -quantization.codes[0].numel() * math.log(self.quantizer.codebook_size)
        return self.log_likelihood(self.decoder_inputs(quantization.quantized), images) + log_prior

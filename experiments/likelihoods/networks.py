"""The encoder and the decoder of all models, and the interface of the models."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn

from vqvae2.config import Config
from vqvae2.models.blocks import make_decoder, make_encoder
from vqvae2.models.logistic import log_probability


class NetworkConfig(Config):
    """Settings of the encoder and the decoder."""

    stride: int = Field(default=4, ge=1, le=64, description="pixels per position of the latent map")
    channels: int = Field(default=128, ge=2, le=4096, description="hidden channels")
    residual_channels: int = Field(default=64, ge=1, le=4096, description="hidden channels of the residual blocks")
    residual_layers: int = Field(default=2, ge=0, le=64, description="residual blocks")


class LatentModel(nn.Module, ABC):
    """Base class of models p(x) = ∫ p(x | z) p(z) dz of images, trained by maximizing a lower bound of log p(x).

    Models differ in their latents z only. Encoder and decoder are the same, except for the number of channels between
    them and the latents.

    Args:
        encoder_outputs: Outputs of the encoder per position of the latent map.
        decoder_inputs: Inputs of the decoder per position.
    """

    kind: ClassVar[str]  # "vae"

    def __init__(self, config: NetworkConfig, image_channels: int, encoder_outputs: int, decoder_inputs: int) -> None:
        super().__init__()
        sizes = config.stride, config.residual_channels, config.residual_layers
        self.encoder = make_encoder(image_channels, config.channels, *sizes)
        self.head = nn.Conv2d(config.channels, encoder_outputs, 1)
        self.decoder = make_decoder(decoder_inputs, config.channels, 2 * image_channels, *sizes)

    @abstractmethod
    def objective(
        self, images: UInt8[Tensor, "b c h w"], quantized: bool = True
    ) -> tuple[Float[Tensor, " b"], dict[str, Tensor]]:
        """Return what training maximizes, in nats per image, and terms for the log.

        Its value is that of `bound`, minus losses of the latents if there are any, and its gradient is the estimator of
        the method. `quantized=False` is for the first steps of models whose latents are quantized, without this.
        """

    @abstractmethod
    def bound(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """Return the lower bound of log p(x) that the model is trained with, in nats per image."""

    @abstractmethod
    def log_weights(self, images: UInt8[Tensor, "b c h w"], samples: int) -> Float[Tensor, "k b"]:
        """Return log p(x, z) / q(z | x) of independent samples z of the posterior q."""

    @abstractmethod
    def reconstruct(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the means of the likelihood given latents of the images, in [-1, 1] up to errors of the network."""

    def encode(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b p h2 w2"]:
        """Return the outputs of the encoder."""
        return _at_least_float32(self.head(self.encoder(images.to(self.head.weight.dtype) / 127.5 - 1)))

    def log_likelihood(
        self, latents: Float[Tensor, "*k b d h2 w2"], images: UInt8[Tensor, "b c h w"]
    ) -> Float[Tensor, "*k b"]:
        """Return log p(x | z) in nats per image, for one or several latents per image."""
        mean, log_scale = self.likelihood_parameters(latents)
        return log_probability(images.expand(mean.shape), mean, log_scale).sum((-3, -2, -1))

    def likelihood_parameters(
        self, latents: Float[Tensor, "*k b d h2 w2"]
    ) -> tuple[Float[Tensor, "*k b c h w"], Float[Tensor, "*k b c h w"]]:
        """Return mean and log-scale of the discretized logistic likelihood of each value."""
        decoded = _at_least_float32(self.decoder(latents.flatten(0, -4)))
        mean, log_scale = decoded.unflatten(0, latents.shape[:-3]).chunk(2, -3)
        return mean, log_scale


def _at_least_float32(values: Tensor) -> Tensor:
    """Return values that autocast may have computed in less precision as float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

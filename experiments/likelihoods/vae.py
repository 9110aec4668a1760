"""The VAE: Gaussian latents with a standard normal prior (Kingma and Welling 2014, arXiv 1312.6114)."""

from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from experiments.likelihoods.networks import LatentModel, NetworkConfig

_LOG_VARIANCE_LIMIT = 10.0  # keeps exp(±log variance) of the posterior finite


class VAE(LatentModel):
    """Model with `latents` Gaussian variables per position of the latent map.

    >>> model = VAE(NetworkConfig(channels=8), image_channels=3, latents=2)
    >>> model.bound(torch.zeros(5, 3, 32, 32, dtype=torch.uint8)).shape
    torch.Size([5])
    """

    kind: ClassVar[str] = "vae"

    def __init__(self, config: NetworkConfig, image_channels: int, latents: int) -> None:
        super().__init__(config, image_channels, 2 * latents, latents)

    def objective(
        self, images: UInt8[Tensor, "b c h w"], quantized: bool = True
    ) -> tuple[Float[Tensor, " b"], dict[str, Tensor]]:
        mean, log_variance = self.posterior(images)
        latents = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        # KL divergence of the posterior from the prior (Kingma and Welling 2014, appendix B)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
        return self.log_likelihood(latents, images) - divergence, {"divergence": divergence.mean()}

    def bound(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """Return the evidence lower bound, estimated with one sample; the KL divergence is exact."""
        return self.objective(images)[0]

    def log_weights(self, images: UInt8[Tensor, "b c h w"], samples: int) -> Float[Tensor, "k b"]:
        mean, log_variance = self.posterior(images)
        weights = []
        for _ in range(samples):
            noise = torch.randn_like(mean)
            latents = mean + (log_variance / 2).exp() * noise
            log_ratio = 0.5 * (noise.square() + log_variance - latents.square())  # log p(z) / q(z | x)
            weights.append(self.log_likelihood(latents, images) + log_ratio.flatten(1).sum(1))
        return torch.stack(weights)

    def reconstruct(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.likelihood_parameters(self.posterior(images)[0])[0]

    def posterior(
        self, images: UInt8[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b n h2 w2"], Float[Tensor, "b n h2 w2"]]:
        """Return mean and log-variance of the latents."""
        mean, log_variance = self.encode(images).chunk(2, 1)
        return mean, log_variance.clamp(-_LOG_VARIANCE_LIMIT, _LOG_VARIANCE_LIMIT)

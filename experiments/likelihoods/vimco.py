"""Categorical latents trained with VIMCO (Mnih and Rezende 2016, arXiv 1602.06725)."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from experiments.likelihoods.networks import LatentModel, NetworkConfig
from vqvae2.models.multi_sample_bounds import multi_sample_bound, vimco_objective


class VIMCO(LatentModel):
    """Model with `latents` categorical variables per position of the latent map, and a uniform prior over them.

    The encoder returns the logits of a factorized posterior. The decoder receives a learned vector for each category.

    >>> model = VIMCO(NetworkConfig(channels=8), 3, 2, categories=16, code_dim=4, samples=5)
    >>> model.bound(torch.zeros(5, 3, 32, 32, dtype=torch.uint8)).shape
    torch.Size([5])
    """

    kind: ClassVar[str] = "vimco"

    def __init__(
        self, config: NetworkConfig, image_channels: int, latents: int, categories: int, code_dim: int, samples: int
    ) -> None:
        super().__init__(config, image_channels, latents * categories, latents * code_dim)
        self.latents, self.samples = latents, samples
        self.embedding = nn.Embedding(categories, code_dim)

    def objective(
        self, images: UInt8[Tensor, "b c h w"], quantized: bool = True
    ) -> tuple[Float[Tensor, " b"], dict[str, Tensor]]:
        log_posterior = self.log_posterior(images)
        log_weights, log_q = self.weigh(images, log_posterior, self.sample_codes(log_posterior, self.samples))
        entropy = -(log_posterior.exp() * log_posterior).sum(-1).mean()
        return vimco_objective(log_weights, log_q), {"posterior_entropy": entropy}

    def bound(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """Return the bound with as many samples as in training."""
        return multi_sample_bound(self.log_weights(images, self.samples))

    def log_weights(self, images: UInt8[Tensor, "b c h w"], samples: int) -> Float[Tensor, "k b"]:
        log_posterior = self.log_posterior(images)
        draws = (self.sample_codes(log_posterior, 1) for _ in range(samples))
        return torch.cat([self.weigh(images, log_posterior, codes)[0] for codes in draws])

    def reconstruct(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the means of the likelihood given one sample of the codes."""
        codes = self.sample_codes(self.log_posterior(images), 1)[0]
        return self.likelihood_parameters(self.decoder_inputs(codes))[0]

    def log_posterior(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b n h2 w2 v"]:
        """Return the log-probabilities of all categories of each latent."""
        return self.encode(images).unflatten(1, (self.latents, -1)).movedim(2, -1).log_softmax(-1)

    def sample_codes(self, log_posterior: Float[Tensor, "b n h2 w2 v"], samples: int) -> Int[Tensor, "k b n h2 w2"]:
        """Draw independent samples of all latents."""
        probabilities = log_posterior.detach().exp().flatten(0, -2)
        draws = torch.multinomial(probabilities, samples, replacement=True)  # (B · n · h · w, k)
        return draws.T.unflatten(1, log_posterior.shape[:-1])

    def weigh(
        self,
        images: UInt8[Tensor, "b c h w"],
        log_posterior: Float[Tensor, "b n h2 w2 v"],
        codes: Int[Tensor, "k b n h2 w2"],
    ) -> tuple[Float[Tensor, "k b"], Float[Tensor, "k b"]]:
        """Return log p(x, z) / q(z | x) and log q(z | x) of codes z."""
        log_q = log_posterior.gather(-1, codes.movedim(0, -1)).flatten(1, -2).sum(1).T  # (b, n, h, w, k) → (k, b)
        log_prior = -codes[0, 0].numel() * math.log(self.embedding.num_embeddings)
        return self.log_likelihood(self.decoder_inputs(codes), images) + log_prior - log_q, log_q

    def decoder_inputs(self, codes: Int[Tensor, "*b n h2 w2"]) -> Float[Tensor, "*b d h2 w2"]:
        """Return the vectors of all codes of a position, concatenated."""
        return F.embedding(codes, self.embedding.weight).movedim(-1, -3).flatten(-4, -3)

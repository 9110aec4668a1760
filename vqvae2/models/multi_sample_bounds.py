"""Lower bounds of log p(x) from several samples of the latents, and their gradient for discrete latents."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def multi_sample_bound(log_weights: Float[Tensor, "k b"]) -> Float[Tensor, " b"]:
    """Return log 1/k Σ p(x, z_i) / q(z_i | x), a lower bound of log p(x) on average (Burda et al. 2016)."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def vimco_objective(log_weights: Float[Tensor, "k b"], log_q: Float[Tensor, "k b"]) -> Float[Tensor, " b"]:
    """Return the multi-sample bound, with the gradient of VIMCO's estimator.

    The gradient of log q(z_j | x) is weighted by how much sample j raises the bound, compared with the bound in which
    the weight of sample j is the geometric mean of the other ones. This baseline does not depend on sample j, so the
    estimator is unbiased (Mnih and Rezende 2016, arXiv 1602.06725, eq. 8 and 9).

    Args:
        log_weights: log p(x, z_j) / q(z_j | x) of k ≥ 2 independent samples.
        log_q: log q(z_j | x), with gradients to the encoder.
    """
    samples = len(log_weights)
    bound = multi_sample_bound(log_weights)
    with torch.no_grad():
        geometric_mean = (log_weights.sum(0) - log_weights) / (samples - 1)
        own = torch.eye(samples, dtype=torch.bool, device=log_weights.device)[..., None]
        replaced = torch.where(own, geometric_mean[:, None], log_weights)  # (j, k, b): weight j replaced
        baselines = torch.stack([multi_sample_bound(each) for each in replaced])
        signal = bound - baselines
    score = (signal * log_q).sum(0)
    return bound + score - score.detach()

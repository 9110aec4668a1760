"""How gradients pass a quantizer: the straight-through estimator and the rotation trick."""

import torch.nn.functional as F
from torch import Tensor


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """Return `quantized`, with the identity as its gradient with respect to `latents`.

    The straight-through estimator (van den Oord et al. 2017, section 3.1).
    """
    return latents + (quantized - latents).detach()


def rotation_trick(latents: Tensor, quantized: Tensor) -> Tensor:
    """Return `quantized`, with a rotation and scaling as its gradient with respect to `latents`.

    The rotation maps each latent vector (last dimension) onto its quantized vector and is treated as a constant, so the
    gradient keeps its angle to the quantized vector (Fifty et al. 2024, arXiv 2410.06424, eq. 4).
    """
    source = F.normalize(latents.detach(), dim=-1)
    target = F.normalize(quantized.detach(), dim=-1)
    middle = F.normalize(source + target, dim=-1)
    scale = quantized.detach().norm(dim=-1, keepdim=True) / latents.detach().norm(dim=-1, keepdim=True).clamp_min(1e-6)
    along_middle = (latents * middle).sum(-1, keepdim=True)
    along_source = (latents * source).sum(-1, keepdim=True)
    return scale * (latents - 2 * along_middle * middle + 2 * along_source * target)

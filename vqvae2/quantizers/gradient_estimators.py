"""How gradients pass a quantizer: the straight-through estimator and the rotation trick."""

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_LENGTH, _MIN_MIDDLE = 1e-6, 1e-3  # of latents, and of the sum of both unit vectors, whose rounding is 1e-7


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """Return `quantized`, with the identity as its gradient with respect to `latents`.

    The straight-through estimator (van den Oord et al. 2017, section 3.1).
    """
    return latents + (quantized - latents).detach()


def rotation_trick(latents: Tensor, quantized: Tensor) -> Tensor:
    """Return `quantized`, with a rotation and scaling as its gradient with respect to `latents`.

    The rotation maps each latent vector (last dimension) onto its quantized vector and is treated as a constant, so the
    gradient keeps its angle to the quantized vector (Fifty et al. 2024, arXiv 2410.06424, eq. 4). Zero latents and
    those opposite to their quantized vector define no rotation, so their gradient is the straight-through one.
    """
    length = latents.detach().norm(dim=-1, keepdim=True)
    source = F.normalize(latents.detach(), dim=-1)
    target = F.normalize(quantized.detach(), dim=-1)
    middle = F.normalize(source + target, dim=-1)
    is_rotation = (length > _MIN_LENGTH) & ((source + target).norm(dim=-1, keepdim=True) > _MIN_MIDDLE)
    scale = quantized.detach().norm(dim=-1, keepdim=True) / length.clamp_min(_MIN_LENGTH)
    along_middle = (latents * middle).sum(-1, keepdim=True)
    along_source = (latents * source).sum(-1, keepdim=True)
    rotated = scale * (latents - 2 * along_middle * middle + 2 * along_source * target)
    return torch.where(is_rotation, rotated, straight_through(latents, quantized))

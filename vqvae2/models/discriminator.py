"""The PatchGAN discriminator (Isola et al. 2017, arXiv 1611.07004, appendix 6.1.2)."""

import itertools
import math

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from vqvae2.config import Config
from vqvae2.errors import UserError

_MAX_CHANNEL_MULTIPLIER = 8


class DiscriminatorConfig(Config):
    """Settings of a patch discriminator. The defaults have a receptive field of 70 × 70 pixels."""

    channels: int = Field(
        default=64,
        ge=1,
        le=2**12,
        description="channels of the first layer; they double with each layer, up to eight times",
    )
    layers: int = Field(default=3, ge=1, le=6, description="layers of stride 2")

    def build(self, size: tuple[int, int], image_channels: int = 3) -> "PatchDiscriminator":
        """Build the network with random weights for images of `size` (height, width).

        Raises:
            UserError: If the images are too small for the number of layers.
        """
        min_size = 3 * 2**self.layers
        if min(size) < min_size:
            fits = int(math.log2(max(min(size) // 3, 1)))
            fix = f"Use at most {fits} layers." if fits else "Set the adversarial weight to 0."
            raise UserError(
                f"autoencoder.loss.adversarial.discriminator.layers: {self.layers} layers need images of at least "
                f"{min_size} pixels, got {size[0]} × {size[1]}. {fix}"
            )
        return PatchDiscriminator(self, image_channels)


class PatchDiscriminator(nn.Module):
    """Network that scores each patch of an image: high for real, low for reconstructed.

    It uses group normalization instead of batch normalization, so scores do not depend on the rest of the batch or on
    the number of processes.

    >>> import torch
    >>> DiscriminatorConfig(channels=8).build((64, 64))(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 1, 6, 6])
    """

    def __init__(self, config: DiscriminatorConfig, image_channels: int = 3) -> None:
        super().__init__()
        widths = [config.channels * min(2**layer, _MAX_CHANNEL_MULTIPLIER) for layer in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for index, (in_channels, out_channels) in enumerate(itertools.pairwise(widths), 1):
            stride = 2 if index < config.layers else 1
            # No bias: the normalization layer has one.
            layers.append(nn.Conv2d(in_channels, out_channels, 4, stride, 1, bias=False))
            layers += [nn.GroupNorm(math.gcd(32, out_channels), out_channels), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.body:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 _ _"]:
        """Return one score per patch of images in [-1, 1]."""
        return self.body(images)

"""The patch discriminator (Isola et al. 2017, arXiv 1611.07004, appendix 6.1.2): is each patch of an image real?"""

import itertools
import math

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from vqvae2.config import Config
from vqvae2.errors import UserError

_WIDEST = 8  # times the width of the first layer


class DiscriminatorConfig(Config):
    """Settings of a patch discriminator; the defaults judge patches of 70 × 70 pixels."""

    channels: int = Field(default=64, ge=1, description="width of the first layer; it doubles, up to eight times this")
    layers: int = Field(default=3, ge=1, le=6, description="layers that halve the size")

    def build(self, size: tuple[int, int], image_channels: int = 3) -> "PatchDiscriminator":
        """The network for images of `size` (height, width), weights random; UserError where they are too small."""
        needed = 3 * 2**self.layers
        if min(size) < needed:
            fits = int(math.log2(max(min(size) // 3, 1)))
            raise UserError(
                f"autoencoder.loss.adversarial.discriminator.layers: {self.layers} layers need images of {needed} "
                f"pixels, these have {size[0]} × {size[1]}; "
                + (f"at most {fits} layers fit" if fits else "no discriminator fits; set the adversarial weight to 0")
            )
        return PatchDiscriminator(self, image_channels)


class PatchDiscriminator(nn.Module):
    """Scores each patch: high for real, low for reconstructed.

    Groups of channels are normalised instead of batches, so a score depends on its image alone, and two processes
    compute what one does.
    """

    def __init__(self, config: DiscriminatorConfig, image_channels: int = 3) -> None:
        super().__init__()
        widths = [config.channels * min(2**layer, _WIDEST) for layer in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for index, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            stride = 2 if index < config.layers else 1
            # No bias before a normalisation, which brings its own.
            layers.append(nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False))
            layers += [nn.GroupNorm(math.gcd(32, outputs), outputs), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.body:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 _ _"]:
        """A score for each patch of images in [-1, 1]."""
        return self.body(images)

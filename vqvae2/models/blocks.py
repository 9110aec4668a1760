"""Convolutional stacks that shrink and grow maps by any whole factor, with residual blocks at the small end."""

from collections.abc import Sequence

from torch import Tensor, nn


class Residual(nn.Module):
    """x + 1×1 conv(ReLU(3×3 conv(ReLU(x))))."""

    def __init__(self, channels: int, residual_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, residual_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(residual_channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def make_encoder(
    inputs: int, channels: int, stride: int, residual_channels: int, residual_layers: int
) -> nn.Sequential:
    """(B, inputs, H, W) to (B, channels, H / stride, W / stride): strided convolutions, a 3×3 one, residual blocks.

    The first strided convolution has half the channels, as in the reference networks of both papers.
    """
    widths = [channels // 2, *[channels] * stride.bit_length()]
    layers: list[nn.Module] = []
    for factor, width in zip(prime_factors(stride), widths, strict=False):
        layers += [nn.Conv2d(inputs, width, *_strided(factor)), nn.ReLU(inplace=True)]
        inputs = width
    layers.append(nn.Conv2d(inputs, channels, 3, padding=1))
    layers += [Residual(channels, residual_channels) for _ in range(residual_layers)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


def make_decoder(
    inputs: int, channels: int, outputs: int, stride: int, residual_channels: int, residual_layers: int
) -> nn.Sequential:
    """(B, inputs, h, w) to (B, outputs, h · stride, w · stride), the mirror image of `shrink`."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, channels, 3, padding=1)]
    layers += [Residual(channels, residual_channels) for _ in range(residual_layers)]
    layers.append(nn.ReLU(inplace=True))
    factors = prime_factors(stride)[::-1]
    if not factors:
        return nn.Sequential(*layers, nn.Conv2d(channels, outputs, 3, padding=1))
    widths = [*[channels] * (len(factors) - 2), *[channels // 2] * (len(factors) > 1)]
    return nn.Sequential(*layers, *upsample(channels, [*widths, outputs], factors))


def upsample(inputs: int, widths: Sequence[int], factors: Sequence[int]) -> nn.Sequential:
    """Transposed convolutions, one per factor, each to its width, with ReLU between them; nothing for no factor."""
    layers: list[nn.Module] = []
    for factor, width in zip(factors, widths, strict=True):
        layers += [nn.ReLU(inplace=True)] if layers else []
        layers.append(nn.ConvTranspose2d(inputs, width, *_strided(factor)))
        inputs = width
    return nn.Sequential(*layers)


def prime_factors(number: int) -> list[int]:
    """Prime factors in rising order, none for 1: 12 → [2, 2, 3]."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def _strided(factor: int) -> tuple[int, int, int]:
    """Kernel, stride and padding that change a size by exactly `factor`: 4, 2, 1 for two."""
    padding = factor // 2
    return factor + 2 * padding, factor, padding

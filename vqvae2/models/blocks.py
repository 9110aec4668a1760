"""Convolutional encoders and decoders that downsample or upsample by any integer factor."""

from collections.abc import Sequence

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + conv1×1(ReLU(conv3×3(ReLU(x))))."""

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
    in_channels: int, channels: int, stride: int, residual_channels: int, residual_layers: int
) -> nn.Sequential:
    """Return an encoder (B, in_channels, H, W) → (B, channels, H / stride, W / stride).

    Strided convolutions, a 3×3 convolution and residual blocks. The first strided convolution has half the channels, as
    in the reference networks of both papers.
    """
    widths = [channels // 2, *[channels] * stride.bit_length()]
    layers: list[nn.Module] = []
    for factor, width in zip(prime_factors(stride), widths, strict=False):
        layers += [nn.Conv2d(in_channels, width, *_strided_conv_args(factor)), nn.ReLU(inplace=True)]
        in_channels = width
    layers.append(nn.Conv2d(in_channels, channels, 3, padding=1))
    layers += [ResidualBlock(channels, residual_channels) for _ in range(residual_layers)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


def make_decoder(
    in_channels: int, channels: int, out_channels: int, stride: int, residual_channels: int, residual_layers: int
) -> nn.Sequential:
    """Return a decoder (B, in_channels, h, w) → (B, out_channels, h · stride, w · stride), mirroring `make_encoder`."""
    layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1)]
    layers += [ResidualBlock(channels, residual_channels) for _ in range(residual_layers)]
    layers.append(nn.ReLU(inplace=True))
    factors = prime_factors(stride)[::-1]
    if not factors:
        return nn.Sequential(*layers, nn.Conv2d(channels, out_channels, 3, padding=1))
    widths = [*[channels] * (len(factors) - 2), *[channels // 2] * (len(factors) > 1)]
    return nn.Sequential(*layers, *upsample(channels, [*widths, out_channels], factors))


def upsample(in_channels: int, widths: Sequence[int], factors: Sequence[int]) -> nn.Sequential:
    """Return transposed convolutions, one per factor, with ReLU between them. `widths` are their output channels."""
    layers: list[nn.Module] = []
    for factor, width in zip(factors, widths, strict=True):
        layers += [nn.ReLU(inplace=True)] if layers else []
        layers.append(nn.ConvTranspose2d(in_channels, width, *_strided_conv_args(factor)))
        in_channels = width
    return nn.Sequential(*layers)


def prime_factors(number: int) -> list[int]:
    """Return the prime factors of a positive integer in ascending order: 12 → [2, 2, 3], 1 → []."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def _strided_conv_args(factor: int) -> tuple[int, int, int]:
    """Return (kernel size, stride, padding) that resize by exactly `factor`, such as (4, 2, 1) for 2."""
    padding = factor // 2
    return factor + 2 * padding, factor, padding

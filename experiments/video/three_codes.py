"""A VQ-VAE of the codes of an image with a few latents, whose decoder is an autoregressive prior (2017 paper, 4.2)."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from vqvae2.code_maps import CodeMaps, MapSpec
from vqvae2.config import Config
from vqvae2.models.blocks import ResidualBlock
from vqvae2.priors import PixelSNAILConfig, Prior, PriorConfig, PriorSpec
from vqvae2.quantizers import EMAConfig, Quantizer, QuantizerConfig, QuantizerOutput
from vqvae2.training_config import QuantizedTrainingConfig

_SIDE = 4  # of the maps between the latents and the convolutions


class ThreeCodesConfig(Config):
    """Settings of the network and its training."""

    latents: int = Field(default=3, ge=1, le=1024, description="codes of an image")
    channels: int = Field(default=128, ge=1, le=4096, description="hidden channels of the encoder")
    quantizer: QuantizerConfig = EMAConfig(codebook_size=512, code_dim=64)
    decoder: PriorConfig = PixelSNAILConfig(channels=96, residual_channels=96, kernel=3, blocks=2, layers=2, heads=4)
    training: QuantizedTrainingConfig = QuantizedTrainingConfig(steps=50_000)


class LatentConditioner(nn.Module):
    """Conditioner of the decoder: features (B, C, H, W) from the quantized latents."""

    def __init__(self, config: ThreeCodesConfig, level: MapSpec) -> None:
        super().__init__()
        self.shape, channels = level.shape, config.decoder.channels
        self.quantizer = config.quantizer.build()
        self.expand = nn.Linear(config.latents * config.quantizer.code_dim, channels * _SIDE**2)
        self.stack = nn.Sequential(*(ResidualBlock(channels, channels) for _ in range(2)))

    def forward(self, batch: int, coarser: CodeMaps, labels: Tensor | None) -> Float[Tensor, "b c h w"]:
        """Return the features of latent codes (B, 1, N), the only coarser map."""
        del batch, labels
        return self.features(self.quantizer.lookup(coarser[0]))

    def features(self, quantized: Float[Tensor, "b d 1 n"]) -> Float[Tensor, "b c h w"]:
        """Return the features of quantized latents."""
        maps = self.expand(quantized.flatten(1)).unflatten(1, (-1, _SIDE, _SIDE))
        return self.stack(F.interpolate(maps, self.shape, mode="bilinear"))


class ThreeCodes(nn.Module):
    """Encoder of code maps to a few codes of a second codebook, and their autoregressive decoder.

    `decoder` is a prior of the library with the latents as its coarser level, so it is sampled as other priors.

    >>> import torch
    >>> network = ThreeCodes(ThreeCodesConfig(), MapSpec(codebook_size=16, height=8, width=8))
    >>> network.eval().encode(torch.zeros(2, 8, 8, dtype=torch.int64)).shape
    torch.Size([2, 1, 3])
    """

    def __init__(self, config: ThreeCodesConfig, level: MapSpec) -> None:
        super().__init__()
        self.config, self.level = config, level
        channels, size = config.channels, config.latents * config.quantizer.code_dim
        self.embedding = nn.Embedding(level.codebook_size, channels)
        blocks = (ResidualBlock(channels, channels) for _ in range(2))
        self.encoder = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), *blocks, nn.ReLU())
        self.pre_quant = nn.Sequential(nn.AdaptiveAvgPool2d(_SIDE), nn.Flatten(), nn.Linear(channels * _SIDE**2, size))
        latents = MapSpec(codebook_size=config.quantizer.codebook_size, height=1, width=config.latents)
        self.decoder: Prior = config.decoder.build(PriorSpec(level=level, coarser=(latents,)))
        self.decoder.conditioner = LatentConditioner(config, level)

    @property
    def conditioner(self) -> LatentConditioner:
        assert isinstance(self.decoder.conditioner, LatentConditioner)
        return self.decoder.conditioner

    @property
    def quantizer(self) -> Quantizer:
        return self.conditioner.quantizer

    def forward(
        self, codes: Int[Tensor, "b h w"], quantized: bool = True
    ) -> tuple[Float[Tensor, "b k h w"], QuantizerOutput]:
        """Return the decoder's logits of the codes, and the output of the quantizer.

        `quantized=False` passes the latents to the decoder unquantized, for the first steps of training.
        """
        features = self.features(codes)
        output = self.quantizer(features) if quantized else self.quantizer.pass_through(features)
        return self.decoder.conditional_logits(codes, self.conditioner.features(output.quantized)), output

    def features(self, codes: Int[Tensor, "b h w"]) -> Float[Tensor, "b d 1 n"]:
        """Return the latents before quantization."""
        latents = self.pre_quant(self.encoder(self.embedding(codes).movedim(-1, 1)))
        return latents.unflatten(1, (self.config.quantizer.code_dim, 1, -1))

    def encode(self, codes: Int[Tensor, "b h w"]) -> Int[Tensor, "b 1 n"]:
        """Return the latent codes, as the coarser map of the decoder."""
        return self.quantizer(self.features(codes)).codes

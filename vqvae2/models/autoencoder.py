"""The hierarchical VQ-VAE (Razavi et al. 2019, section 3.1) of any number of levels; one level is the VQ-VAE of 2017.

Levels are a tuple, finest first. Encoders run from the image up to the coarsest level; quantizing runs back down: what
the coarser levels have fixed is decoded to the size of the next level and joined to its features before they are
quantized. The decoder sees the quantized maps of all levels.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from vqvae2 import checkpoint, files
from vqvae2.code_maps import CodeMaps, MapSpec
from vqvae2.config import Config
from vqvae2.errors import UserError
from vqvae2.models.blocks import make_decoder, make_encoder, prime_factors, upsample
from vqvae2.quantizers import EMAConfig, Quantizer, QuantizerConfig, QuantizerOutput


class LevelConfig(Config):
    """One level: how much smaller its maps are than the level before (the image, for the first), and its codebook."""

    stride: int = Field(default=2, ge=1, le=64)
    quantizer: QuantizerConfig = EMAConfig()


class AutoencoderConfig(Config):
    """The network; the defaults are the ImageNet column of the VQ-VAE-2 paper."""

    levels: tuple[LevelConfig, ...] = Field(
        default=(LevelConfig(stride=4), LevelConfig(stride=2)), min_length=1, max_length=4
    )
    channels: int = Field(default=128, ge=2, description="hidden units")
    residual_channels: int = Field(default=64, ge=1, description="hidden units of a residual block")
    residual_layers: int = Field(default=2, ge=0, description="residual blocks in each encoder and decoder")

    def build(self, size: tuple[int, int], image_channels: int = 3) -> "Autoencoder":
        """The network for images of `size` (height, width), weights random; UserError where sizes do not divide."""
        return Autoencoder(self, size, image_channels)


class AutoencoderOutput(NamedTuple):
    """What the autoencoder makes of images."""

    images: Float[Tensor, "b c h w"]
    levels: tuple[QuantizerOutput, ...]  # finest first


class Autoencoder(nn.Module):
    """Encodes images to one integer map a level, and decodes such maps back to images.

    Images are float32 (B, C, H, W) in [-1, 1]; with strides 4 and 2, 256 × 256 images have codes (64 × 64, 32 × 32).
    """

    digest: str | None = None  # SHA-256 of the file the weights came from

    def __init__(self, config: AutoencoderConfig, size: tuple[int, int], image_channels: int = 3) -> None:
        super().__init__()
        _check_size(config, size)
        self.config, self.size, self.image_channels = config, size, image_channels
        c, r, n = config.channels, config.residual_channels, config.residual_layers
        dims = [level.quantizer.code_dim for level in config.levels]
        strides = [level.stride for level in config.levels]
        top = len(dims) - 1
        # Width of everything known once level i is quantized: its own map, and the coarser ones brought to its size.
        known = [2 * dim for dim in dims[:-1]] + dims[-1:]
        below_top = range(top)
        self.encoders = nn.ModuleList(
            make_encoder(image_channels if i == 0 else c, c, stride, r, n) for i, stride in enumerate(strides)
        )
        self.decoders = nn.ModuleList(  # from what is known at level i + 1 to the size of level i
            make_decoder(known[i + 1], c, dims[i + 1], strides[i + 1], r, n) for i in below_top
        )
        self.pre_quant_convs = nn.ModuleList(
            nn.Conv2d(c + (dims[i + 1] if i < top else 0), dim, 1) for i, dim in enumerate(dims)
        )
        self.quantizers = nn.ModuleList(level.quantizer.build() for level in config.levels)
        self.upsamplers = nn.ModuleList(_bring_up(known[i + 1], dims[i], strides[i + 1]) for i in below_top)
        self.decoder = make_decoder(known[0], c, image_channels, strides[0], r, n)
        # Activations follow the weights: convolutions run faster so, and features already are rows for the quantizers.
        self.to(memory_format=torch.channels_last)

    @property
    def map_specs(self) -> tuple[MapSpec, ...]:
        """The code maps of each level, finest first."""
        specs, (height, width) = [], self.size
        for level, quantizer in zip(self.config.levels, self._quantizers(), strict=True):
            height, width = height // level.stride, width // level.stride
            specs.append(MapSpec(codebook_size=quantizer.codebook_size, height=height, width=width))
        return tuple(specs)

    def forward(self, images: Float[Tensor, "b c h w"], quantize: bool = True) -> AutoencoderOutput:
        """Reconstruct images; what each level adds to the training loss comes with its `QuantizerOutput`.

        Not `quantized`, every level passes its features through as they are.
        """
        self._check_images(images)
        features = []
        for encoder in self.encoders:
            images = encoder(images)
            features.append(images)
        levels: list[QuantizerOutput] = []
        known: Tensor | None = None
        quantizers = self._quantizers()
        for index in reversed(range(len(features))):
            joined = features[index]
            if known is not None:
                joined = torch.cat([self.decoders[index](known), joined], 1)
            quantizer, latents = quantizers[index], self.pre_quant_convs[index](joined)
            levels.insert(0, quantizer(latents) if quantize else quantizer.pass_through(latents))
            known = self._add(index, levels[0].quantized, known)
        return AutoencoderOutput(self.decoder(known), tuple(levels))

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> CodeMaps:
        """The codes of images: int64 maps (B, H_l, W_l), finest level first."""
        return tuple(level.codes for level in self(images).levels)

    def decode_features(self, quantized: tuple[Float[Tensor, "b _ _ _"], ...]) -> Float[Tensor, "b c h w"]:
        """Images from quantized features, finest level first."""
        known: Tensor | None = None
        for index in reversed(range(len(quantized))):
            known = self._add(index, quantized[index], known)
        return self.decoder(known)

    @torch.no_grad()
    def decode(self, codes: CodeMaps, only: tuple[bool, ...] | None = None) -> Float[Tensor, "b c h w"]:
        """Images in [-1, 1] from integer maps, finest level first; ValueError where shapes or values do not fit.

        `only` names the levels that take part; any other is replaced by the mean of its own map, so that the picture
        shows what the rest carries.
        """
        found = tuple(tuple(level.shape[1:]) for level in codes)
        expected = tuple(level.shape for level in self.map_specs)
        if found != expected:
            raise ValueError(f"expected code maps of sizes {expected}, finest first, got {found}")
        values = []
        for index, (level, spec, quantizer) in enumerate(zip(codes, self.map_specs, self._quantizers(), strict=True)):
            if level.numel() and not 0 <= int(level.min()) <= int(level.max()) < spec.codebook_size:
                raise ValueError(f"level {index}: codes must be in [0, {spec.codebook_size})")
            value = quantizer.lookup(level)
            takes_part = only is None or only[index]
            values.append(value if takes_part else value.mean((2, 3), keepdim=True).expand_as(value))
        return self.decode_features(tuple(values)).clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Images in [-1, 1] after a way through the codes and back."""
        return self(images).images.clamp(-1, 1)

    def update_codebooks(self) -> None:
        """Let the codebooks learn from the forward passes since the last call; once after every optimizer step."""
        for quantizer in self._quantizers():
            quantizer.update()

    def save(self, path: Path, **made_from: Any) -> None:
        """Write weights, config and what they were made from to one safetensors file."""
        metadata = {
            "network": "autoencoder",
            "config": self.config.plain(),
            "size": self.size,
            "image_channels": self.image_channels,
            "made_from": made_from,
        }
        checkpoint.save(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "Autoencoder":
        """The network in a file that `save` wrote, in evaluation mode; `model.digest` is the file's SHA-256."""
        tensors, metadata = checkpoint.load(path)
        if metadata.get("network") != "autoencoder":
            raise UserError(f"{path}: holds a {metadata.get('network')}, not an autoencoder")
        config = AutoencoderConfig.parse(metadata["config"], str(path))
        with torch.device("meta"):
            height, width = metadata["size"]
            model = config.build((height, width), metadata["image_channels"])
        model = model.to_empty(device="cpu")
        checkpoint.load_state_dict(model, tensors, path)
        model.digest = files.digest(path)
        return model.to(device).eval().requires_grad_(False)

    def _add(self, index: int, values: Tensor, known: Tensor | None) -> Tensor:
        """What is known at level `index`: the coarser levels brought to its size, then its own quantized map."""
        return values if known is None else torch.cat([self.upsamplers[index](known), values], 1)

    def _quantizers(self) -> list[Quantizer]:
        return [quantizer for quantizer in self.quantizers if isinstance(quantizer, Quantizer)]

    def _check_images(self, images: Tensor) -> None:
        expected = (self.image_channels, *self.size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"expected images (batch, {', '.join(map(str, expected))}), got {tuple(images.shape)}")


def _bring_up(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Coarser maps to the size of the next finer level."""
    factors = prime_factors(stride)[::-1]
    return upsample(inputs, [outputs] * len(factors), factors) if factors else nn.Conv2d(inputs, outputs, 1)


def _check_size(config: AutoencoderConfig, size: tuple[int, int]) -> None:
    total = 1
    for level in config.levels:
        total *= level.stride
    for name, length in zip(("height", "width"), size, strict=True):
        if length < total or length % total:
            lower = max(length // total, 1) * total
            raise UserError(
                f"data.size: the {name} {length} does not divide by {total} (the product of all strides); "
                f"the nearest sizes that do are {lower} and {lower + total}"
            )

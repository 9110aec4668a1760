"""The hierarchical VQ-VAE (Razavi et al. 2019, section 3.1) with any number of levels.

One level is the VQ-VAE of van den Oord et al. 2017, two levels are VQ-VAE-2. Levels are ordered finest first. Encoders
run from the image to the coarsest level. Quantization runs from the coarsest level to the finest: the quantized coarser
levels are decoded to the size of the next level and concatenated with its features before these are quantized. The
final decoder sees the quantized maps of all levels. With level dropout, it also learns to decode the coarser levels
without the finer ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack

import torch
from jaxtyping import Float, Integer
from pydantic import Field, model_validator
from torch import Tensor, nn

from vqvae2 import checkpoint, files
from vqvae2.code_maps import CodeMaps, MapSpec, PositiveInt
from vqvae2.config import Config
from vqvae2.errors import UserError
from vqvae2.hub import HubOptions, PushOptions, push, weights_file
from vqvae2.models.blocks import make_decoder, make_encoder, prime_factors, upsample
from vqvae2.quantizers import EMAConfig, Quantizer, QuantizerConfig, QuantizerOutput
from vqvae2.run_folder import WEIGHTS, level_names


class LevelConfig(Config):
    """Stride and quantizer of one level."""

    stride: int = Field(default=2, ge=1, le=64, description="downsampling from the next finer level, or from the image")
    quantizer: QuantizerConfig = EMAConfig()
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="training: share of images decoded without this level and all finer ones; 0 for the coarsest level",
    )


class AutoencoderConfig(Config):
    """Settings of the network. The defaults are the ImageNet settings of the VQ-VAE-2 paper."""

    levels: tuple[LevelConfig, ...] = Field(
        default=(LevelConfig(stride=4), LevelConfig(stride=2)), min_length=1, max_length=4, description="finest first"
    )
    channels: int = Field(default=128, ge=2, le=2**14, description="hidden channels")
    residual_channels: int = Field(default=64, ge=1, le=2**14, description="hidden channels of a residual block")
    residual_layers: int = Field(default=2, ge=0, le=256, description="residual blocks in each encoder and decoder")

    @model_validator(mode="after")
    def _check_dropout(self) -> "AutoencoderConfig":
        if self.levels[-1].dropout:
            raise ValueError("levels: the coarsest level, the last in the list, cannot have dropout")
        return self

    @property
    def progressive_levels(self) -> tuple[tuple[str, ...], ...]:
        """The names of the levels that decode to an image together: the coarsest alone first, all levels last.

        Without dropout, only all levels together do.
        """
        names = level_names(len(self.levels))
        starts = [index + 1 for index, level in enumerate(self.levels) if level.dropout]
        return tuple(names[start:] for start in [*reversed(starts), 0])

    def build(self, size: tuple[int, int], image_channels: int = 3) -> "Autoencoder":
        """Build the network with random weights for images of `size` (height, width).

        Raises:
            UserError: If the height or width is not divisible by the product of all strides.
        """
        return Autoencoder(self, size, image_channels)


class AutoencoderOutput(NamedTuple):
    """Output of the autoencoder's forward pass."""

    images: Float[Tensor, "b c h w"]  # reconstructions, not clamped
    levels: tuple[QuantizerOutput, ...]  # finest first


class _StoredAutoencoder(Config):
    """Metadata of an autoencoder's weights file."""

    network: Literal["autoencoder"] = "autoencoder"
    config: AutoencoderConfig
    size: tuple[PositiveInt, PositiveInt]
    image_channels: PositiveInt
    made_from: dict[str, Any] = Field(default_factory=dict)


class Autoencoder(nn.Module):
    """Encoder of images to one integer map per level, and decoder of such maps to images.

    Images are float32 (B, C, H, W) in [-1, 1]. With strides 4 and 2, images of 256 × 256 pixels have code maps of
    64 × 64 and 32 × 32.

    >>> config = AutoencoderConfig(channels=8, residual_channels=4)
    >>> model = config.build(size=(32, 32)).eval()
    >>> codes = model.encode(torch.zeros(2, 3, 32, 32))
    >>> [tuple(level.shape) for level in codes]  # finest first
    [(2, 8, 8), (2, 4, 4)]
    >>> model.decode(codes).shape
    torch.Size([2, 3, 32, 32])
    """

    digest: str | None = None  # SHA-256 of the file that the weights were loaded from
    made_from: dict[str, Any]  # provenance of the weights

    def __init__(self, config: AutoencoderConfig, size: tuple[int, int], image_channels: int = 3) -> None:
        super().__init__()
        self.made_from = {}
        _check_size(config, size)
        self.config, self.size, self.image_channels = config, size, image_channels
        c, r, n = config.channels, config.residual_channels, config.residual_layers
        dims = [level.quantizer.code_dim for level in config.levels]
        strides = [level.stride for level in config.levels]
        top = len(dims) - 1
        # Channels of the context after level i is quantized: its own map and the upsampled context of level i + 1.
        context_dims = [2 * dim for dim in dims[:-1]] + dims[-1:]
        below_top = range(top)
        self.encoders = nn.ModuleList(
            make_encoder(image_channels if i == 0 else c, c, stride, r, n) for i, stride in enumerate(strides)
        )
        self.decoders = nn.ModuleList(  # from the context of level i + 1 to the size of level i
            make_decoder(context_dims[i + 1], c, dims[i + 1], strides[i + 1], r, n) for i in below_top
        )
        self.pre_quant_convs = nn.ModuleList(
            nn.Conv2d(c + (dims[i + 1] if i < top else 0), dim, 1) for i, dim in enumerate(dims)
        )
        self.quantizers = nn.ModuleList(level.quantizer.build() for level in config.levels)
        self.upsamplers = nn.ModuleList(
            _make_upsampler(context_dims[i + 1], dims[i], strides[i + 1]) for i in below_top
        )
        self.decoder = make_decoder(context_dims[0], c, image_channels, strides[0], r, n)
        # Convolutions are faster in channels-last, and quantizers need channels last. Activations follow the weights.
        self.to(memory_format=torch.channels_last)

    @property
    def map_specs(self) -> tuple[MapSpec, ...]:
        """Codebook size and map size of each level, finest first."""
        specs, (height, width) = [], self.size
        for level, quantizer in zip(self.config.levels, self._quantizers(), strict=True):
            height, width = height // level.stride, width // level.stride
            specs.append(MapSpec(codebook_size=quantizer.codebook_size, height=height, width=width))
        return tuple(specs)

    def forward(
        self, images: Float[Tensor, "b c h w"], quantize: bool = True, decoder_only: bool = False
    ) -> AutoencoderOutput:
        """Reconstruct images. `levels` of the output has the codes and the quantization loss of each level.

        With `quantize=False`, features pass through all levels unquantized. With `decoder_only=True`, gradients reach
        only the layers that decode codes to images.
        """
        self._check_images(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not decoder_only):
            levels, context = self._quantize_levels(images, quantize)
        if self.training and any(level.dropout for level in self.config.levels):
            images = self.decode_features(self._drop_levels([level.quantized for level in levels]))
        elif decoder_only:
            images = self.decode_features(tuple(level.quantized for level in levels))
        else:
            images = self.decoder(context)
        return AutoencoderOutput(images, tuple(levels))

    def _quantize_levels(self, images: Tensor, quantize: bool) -> tuple[list[QuantizerOutput], Tensor | None]:
        """Return the output of each level's quantizer, finest first, and the context of the final decoder."""
        features = []
        for encoder in self.encoders:
            images = encoder(images)
            features.append(images)
        levels: list[QuantizerOutput] = []
        context: Tensor | None = None
        quantizers = self._quantizers()
        for index in reversed(range(len(features))):
            inputs = features[index]
            if context is not None:
                inputs = torch.cat([self.decoders[index](context), inputs], 1)
            quantizer, latents = quantizers[index], self.pre_quant_convs[index](inputs)
            levels.insert(0, quantizer(latents) if quantize else quantizer.pass_through(latents))
            context = self._extend_context(index, levels[0].quantized, context)
        return levels, context

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c h w"]) -> CodeMaps:
        """Return the codes of images: int64 maps (B, H_l, W_l), finest level first."""
        return tuple(level.codes for level in self(images).levels)

    def decode_features(self, quantized: tuple[Float[Tensor, "b _ _ _"], ...]) -> Float[Tensor, "b c h w"]:
        """Return images, not clamped, from quantized features (B, D_l, H_l, W_l), finest level first."""
        context: Tensor | None = None
        for index in reversed(range(len(quantized))):
            context = self._extend_context(index, quantized[index], context)
        return self.decoder(context)

    @torch.no_grad()
    def decode(
        self, codes: tuple[Integer[Tensor, "b _ _"], ...], levels: Sequence[str] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """Return images in [-1, 1] from integer maps (B, H_l, W_l) of any integer type, finest level first.

        `levels` names the levels to decode, such as `["top"]`; the default is all of them. The features of another
        level are replaced by zeros if dropout has trained the decoder for that, otherwise by their spatial mean. The
        image then shows what the selected levels encode.

        Raises:
            ValueError: If codes are not integers, map sizes are wrong, a code is outside of the codebook, or there is
                no level of a name.
        """
        names = level_names(len(self.config.levels))
        if levels is not None and not set(levels) <= set(names):
            raise ValueError(f"levels must be some of {', '.join(names)}, got {', '.join(levels)}")
        if any(level.is_floating_point() for level in codes):
            raise ValueError("codes must be integers")
        codes = tuple(level.long() for level in codes)  # those of a code store have a narrow type
        found = tuple(tuple(level.shape[1:]) for level in codes)
        expected = tuple(level.shape for level in self.map_specs)
        if found != expected:
            raise ValueError(f"expected code maps of sizes {expected}, finest first, got {found}")
        features = []
        for index, (level, spec, quantizer) in enumerate(zip(codes, self.map_specs, self._quantizers(), strict=True)):
            if level.numel() and not 0 <= int(level.min()) <= int(level.max()) < spec.codebook_size:
                raise ValueError(f"level {index}: codes must be in [0, {spec.codebook_size})")
            quantized = quantizer.lookup(level)
            if levels is not None and names[index] not in levels:
                dropped_in_training = any(coarser.dropout for coarser in self.config.levels[index:])
                filler = torch.zeros_like if dropped_in_training else _spatial_mean
                quantized = filler(quantized)
            features.append(quantized)
        return self.decode_features(tuple(features)).clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return reconstructions of images, clamped to [-1, 1]."""
        return self(images).images.clamp(-1, 1)

    def update_codebooks(self) -> None:
        """Update all codebooks from the forward passes since the last call. Call once after every optimizer step."""
        for quantizer in self._quantizers():
            quantizer.update()

    def save(self, path: Path, dtype: torch.dtype | None = None, **made_from: Any) -> None:
        """Write weights, config and provenance (`made_from`, JSON-serializable) to one safetensors file.

        Weights are converted to `dtype`, if given. They are float32 again once they are loaded. Of paths in the
        provenance, only the names are written.
        """
        checkpoint.save(path, self.state_dict(), self._stored(made_from).to_dict(), dtype)

    def _stored(self, made_from: dict[str, Any]) -> _StoredAutoencoder:
        return _StoredAutoencoder(
            config=self.config,
            size=self.size,
            image_channels=self.image_channels,
            made_from=files.without_folders(made_from),
        )

    @classmethod
    def from_pretrained(
        cls, source: Path | str, device: torch.device | str = "cpu", **hub: Unpack[HubOptions]
    ) -> "Autoencoder":
        """Load the weights in a safetensors file, in a folder, in a run, or in a hub repository `OWNER/NAME`.

        Returns the network in evaluation mode, without gradients. `hub` are `revision`, `token`, `cache_dir` and
        `local_files_only`, as in `huggingface_hub`.

        Raises:
            UserError: If there are no weights, or they are corrupted.
        """
        return cls.load(weights_file(source, **hub), device)

    @classmethod
    def read_pretrained_config(cls, source: Path | str) -> tuple[AutoencoderConfig, int]:
        """Return the settings and the number of image channels of what `from_pretrained` loads. Reads no weights.

        Raises:
            UserError: If there are no weights.
        """
        path = weights_file(source)
        stored = _StoredAutoencoder.from_dict(checkpoint.read_metadata(path, "autoencoder"), str(path))
        return stored.config, stored.image_channels

    def save_pretrained(self, folder: Path | str) -> None:
        """Write model.safetensors, which contains weights and config, to a folder that `from_pretrained` reads.

        The file config.json repeats the config for readers.
        """
        self.save(Path(folder) / WEIGHTS, **self.made_from)
        files.write_json(Path(folder) / "config.json", self._stored(self.made_from).to_dict())

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Upload what `save_pretrained` writes to a repository on the Hugging Face hub; see `vqvae2.hub.push`."""
        return push(self.save_pretrained, repo_id, **options)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "Autoencoder":
        """Load a file written by `save`. Returns the network in evaluation mode, without gradients, with its `digest`.

        Raises:
            UserError: If the file is missing, corrupted or not an autoencoder.
        """
        tensors, metadata = checkpoint.load(path, "autoencoder")
        stored = _StoredAutoencoder.from_dict(metadata, str(path))
        model = checkpoint.build_module(lambda: stored.config.build(stored.size, stored.image_channels), tensors, path)
        model.digest, model.made_from = files.digest(path), stored.made_from
        return model.to(device).eval().requires_grad_(False)

    def _drop_levels(self, quantized: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Replace levels by zeros: in each image, with the probability `dropout` of a level, it and all finer ones."""
        kept = torch.ones(len(quantized[0]), 1, 1, 1, dtype=torch.bool, device=quantized[0].device)
        maps: list[Tensor] = []
        for level, features in zip(reversed(self.config.levels), reversed(quantized), strict=True):
            if level.dropout:
                kept = kept & (torch.rand(kept.shape, device=kept.device) >= level.dropout)
            maps.insert(0, features * kept)
        return tuple(maps)

    def _extend_context(self, index: int, quantized: Tensor, context: Tensor | None) -> Tensor:
        """Concatenate the upsampled context of the coarser levels with the quantized map of level `index`."""
        return quantized if context is None else torch.cat([self.upsamplers[index](context), quantized], 1)

    def _quantizers(self) -> list[Quantizer]:
        return [quantizer for quantizer in self.quantizers if isinstance(quantizer, Quantizer)]

    def _check_images(self, images: Tensor) -> None:
        expected = (self.image_channels, *self.size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"expected images (batch, {', '.join(map(str, expected))}), got {tuple(images.shape)}")


def _spatial_mean(features: Tensor) -> Tensor:
    return features.mean((2, 3), keepdim=True).expand_as(features)


def _make_upsampler(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return layers that upsample a coarser context to the size of the next finer level."""
    factors = prime_factors(stride)[::-1]
    if not factors:
        return nn.Conv2d(in_channels, out_channels, 1)
    return upsample(in_channels, [out_channels] * len(factors), factors)


def _check_size(config: AutoencoderConfig, size: tuple[int, int]) -> None:
    total = 1
    for level in config.levels:
        total *= level.stride
    for name, length in zip(("height", "width"), size, strict=True):
        if length < total or length % total:
            lower = max(length // total, 1) * total
            raise UserError(
                f"data.size: the {name} {length} is not divisible by {total}, the product of all strides. "
                f"Use {lower} or {lower + total}."
            )

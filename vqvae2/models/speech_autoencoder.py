"""The VQ-VAE of waveforms: strided convolutions, a codebook, and a WaveNet decoder that also knows the speaker."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from vqvae2 import checkpoint, files
from vqvae2.audio.log_mel import BANDS
from vqvae2.audio.mu_law import expand
from vqvae2.code_maps import MapSpec
from vqvae2.config import Config
from vqvae2.models.wavenet import WaveNet, WaveNetConfig
from vqvae2.quantizers import EMAConfig, QuantizerConfig, QuantizerOutput


class SpeechModelConfig(Config):
    """Settings of the autoencoder of waveforms."""

    downsamplings: int = Field(default=6, ge=1, le=12, description="convolutions with stride 2 and window 4")
    channels: int = Field(default=64, ge=1, le=4096, description="hidden channels of the encoder")
    residual_layers: int = Field(default=2, ge=0, le=64, description="residual layers of the encoder")
    quantizer: QuantizerConfig = EMAConfig(codebook_size=512, code_dim=64)
    decoder: WaveNetConfig = WaveNetConfig()

    @property
    def samples_per_code(self) -> int:
        """Number of samples for one code."""
        return 2**self.downsamplings

    def build(self, speakers: tuple[str, ...]) -> "SpeechAutoencoder":
        """Build the network with random weights."""
        return SpeechAutoencoder(self, speakers)


class _StoredSpeechAutoencoder(Config):
    """Metadata of a weights file."""

    network: Literal["speech-autoencoder"] = "speech-autoencoder"
    config: SpeechModelConfig
    speakers: tuple[str, ...] = Field(min_length=1, max_length=2**20)
    made_from: dict[str, Any] = Field(default_factory=dict)


class SpeechOutput(NamedTuple):
    """Output of the network for values (B, T) with F codes."""

    logits: Float[Tensor, "b t 256"]
    quantization: QuantizerOutput | None = None  # None without codes
    spectrum: Float[Tensor, "b 32 f"] | None = None  # log-mel spectrogram predicted from the codes and the speaker


class SpeechAutoencoder(nn.Module):
    """Autoencoder of µ-law waveforms whose decoder is a WaveNet, conditioned on the codes and the speaker.

    >>> import torch
    >>> network = SpeechModelConfig(channels=8, downsamplings=4).build(("anna", "ben"))
    >>> codes = network.encode(torch.full((3, 256), 128))
    >>> codes.shape, network.condition(codes, torch.tensor([0, 1, 1])).shape
    (torch.Size([3, 16]), torch.Size([3, 16, 128]))
    """

    digest: str | None = None  # of the file the weights were loaded from

    def __init__(self, config: SpeechModelConfig, speakers: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.speakers = config, speakers
        channels, dim, condition = config.channels, config.quantizer.code_dim, config.decoder.condition_channels
        self.down = nn.Sequential()
        for index in range(config.downsamplings):
            convolution = nn.Conv1d(channels if index else 1, channels, 4, stride=2, padding=1)
            self.down.extend([convolution, nn.BatchNorm1d(channels), nn.ReLU()])
        self.residual = nn.ModuleList(_residual_layer(channels) for _ in range(config.residual_layers))
        self.pre_quant = nn.Sequential(nn.ReLU(), nn.Conv1d(channels, dim, 1))
        self.quantizer = config.quantizer.build()
        self.post_quant = nn.Conv1d(dim, condition, 5, padding=2)
        self.speaker = nn.Embedding(len(speakers), condition)
        self.context = nn.Conv1d(condition, condition, 5, padding=2)
        self.spectrum = nn.Linear(condition, BANDS)  # for the auxiliary loss
        self.decoder = WaveNet(config.decoder)

    def forward(self, values: Int[Tensor, "b t"], speaker: Int[Tensor, " b"], quantized: bool = True) -> SpeechOutput:
        """Return the predictions for the values, given the earlier ones, the codes and the speaker.

        `quantized=False` passes the features of the encoder to the decoder, for the first steps of training.
        """
        features = self.features(values)
        output = self.quantizer(features) if quantized else self.quantizer.pass_through(features)
        condition = self._condition(output.quantized, speaker)
        return SpeechOutput(self.decoder(values, condition), output, self.spectrum(condition).transpose(1, 2))

    def features(self, values: Int[Tensor, "b t"]) -> Float[Tensor, "b d f"]:
        """Return the features before quantization."""
        x = self.down(expand(values)[:, None])
        for layer in self.residual:
            x = x + layer(x)
        return self.pre_quant(x)

    def map_spec(self, length: int) -> MapSpec:
        """Return the code map of a waveform of `length` samples."""
        width = length // self.config.samples_per_code
        return MapSpec(codebook_size=self.quantizer.codebook_size, height=1, width=width)

    def encode(self, values: Int[Tensor, "b t"]) -> Int[Tensor, "b f"]:
        """Return the codes."""
        return self.quantizer(self.features(values)).codes

    def condition(self, codes: Int[Tensor, "b f"], speaker: Int[Tensor, " b"]) -> Float[Tensor, "b f c"]:
        """Return the conditioning features of the decoder for codes and speakers."""
        return self._condition(self.quantizer.lookup(codes), speaker)

    def _condition(self, quantized: Float[Tensor, "b d f"], speaker: Int[Tensor, " b"]) -> Float[Tensor, "b f c"]:
        x = F.relu(self.post_quant(quantized) + self.speaker(speaker)[:, :, None])
        return F.relu(x + self.context(x)).transpose(1, 2)

    def save(self, path: Path, **made_from: Any) -> None:
        """Write weights, config, speakers and provenance to one safetensors file."""
        stored = _StoredSpeechAutoencoder(config=self.config, speakers=self.speakers, made_from=made_from)
        checkpoint.save(path, self.state_dict(), stored.to_dict())


def load_speech_autoencoder(path: Path) -> SpeechAutoencoder:
    """Load a file written by `SpeechAutoencoder.save`, in evaluation mode.

    Raises:
        UserError: If the file is missing, corrupted or another network.
    """
    tensors, metadata = checkpoint.load(path, "speech-autoencoder")
    stored = _StoredSpeechAutoencoder.from_dict(metadata, str(path))
    network = checkpoint.build_module(lambda: stored.config.build(stored.speakers), tensors, path)
    network.digest = files.digest(path)
    return network.eval().requires_grad_(False)


class UnconditionalWaveNet(nn.Module):
    """A decoder without codes and speakers, to compare likelihoods with."""

    def __init__(self, config: WaveNetConfig) -> None:
        super().__init__()
        self.config, self.decoder = config, config.build(conditioned=False)

    def forward(self, values: Int[Tensor, "b t"], speaker: Int[Tensor, " b"], quantized: bool = True) -> SpeechOutput:
        """Return the logits of the values given the earlier ones."""
        del speaker, quantized
        return SpeechOutput(self.decoder(values))


def _residual_layer(channels: int) -> nn.Sequential:
    """Return a residual branch: normalization, convolution with window 3, ReLU, convolution with window 1."""
    convolutions = nn.Conv1d(channels, channels, 3, padding=1), nn.Conv1d(channels, channels, 1)
    return nn.Sequential(nn.BatchNorm1d(channels), convolutions[0], nn.ReLU(), convolutions[1])

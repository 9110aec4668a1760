"""WaveNet: causal dilated convolutions over µ-law values (van den Oord et al. 2016, arXiv 1609.03499)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from vqvae2.audio.mu_law import NUM_VALUES, SILENCE, to_unit
from vqvae2.config import Config


class WaveNetConfig(Config):
    """Settings of the network."""

    channels: int = Field(default=64, ge=1, le=4096, description="channels of the residual connections and the gates")
    skip_channels: int = Field(default=64, ge=1, le=4096, description="channels of the skip connections")
    condition_channels: int = Field(default=128, ge=1, le=4096, description="channels of the conditioning features")
    cycles: int = Field(default=2, ge=1, le=64, description="how often the dilations are repeated")
    layers: int = Field(default=8, ge=1, le=16, description="layers per cycle, with dilations 1, 2, 4, …")

    @property
    def dilations(self) -> tuple[int, ...]:
        """Dilation of each layer."""
        return tuple(2**layer for layer in range(self.layers)) * self.cycles

    @property
    def receptive_field(self) -> int:
        """Number of earlier samples that a sample depends on."""
        return 1 + sum(self.dilations)

    def build(self, conditioned: bool = True) -> "WaveNet":
        """Build the network with random weights."""
        return WaveNet(self, conditioned)


class WaveNet(nn.Module):
    """p(values | condition), factorized over samples. The condition has one vector per frame of equally many samples.

    Activations are (B, T, C), so that a convolution with window 2 is one matrix product of the current and the delayed
    activations.

    >>> network = WaveNetConfig(channels=8, layers=3).build()
    >>> network(torch.zeros(2, 128, dtype=torch.int64), torch.zeros(2, 4, 128)).shape
    torch.Size([2, 128, 256])
    """

    def __init__(self, config: WaveNetConfig, conditioned: bool = True) -> None:
        super().__init__()
        self.config = config
        channels, skip, dilations = config.channels, config.skip_channels, config.dilations
        self.embedding = nn.Embedding(NUM_VALUES, channels)
        self.condition = (
            nn.Linear(config.condition_channels, 2 * channels * len(dilations), bias=False) if conditioned else None
        )
        self.layers = nn.ModuleList(WaveNetLayer(channels, skip, dilation) for dilation in dilations)
        self.hidden, self.logits = nn.Linear(skip, skip), nn.Linear(skip, NUM_VALUES)
        with torch.no_grad():  # similar values start with similar vectors
            self.embedding.weight.mul_(0.1).add_(to_unit(torch.arange(NUM_VALUES))[:, None] * torch.randn(channels))

    def forward(
        self, values: Int[Tensor, "b t"], condition: Float[Tensor, "b f c"] | None = None
    ) -> Float[Tensor, "b t 256"]:
        """Return logits. Those of sample t depend on the values before t, and on all conditioning features."""
        x = self.embedding(F.pad(values[:, :-1], (1, 0), value=SILENCE))
        skips = x.new_zeros(())
        for layer, features in zip(self.layers, self.layer_conditions(condition), strict=True):
            x, skip = layer(x, features)
            skips = skips + skip
        return self.head(skips)

    def layer_conditions(self, condition: Float[Tensor, "*b c"] | None) -> list[Tensor] | list[None]:
        """Return the terms that the condition adds to the gates of each layer."""
        if self.condition is None or condition is None:
            return [None] * len(self.layers)
        return list(self.condition(condition).chunk(len(self.layers), -1))

    def head(self, skips: Float[Tensor, "*b s"]) -> Float[Tensor, "*b 256"]:
        """Return the logits of summed skip connections."""
        return self.logits(F.relu(self.hidden(F.relu(skips * len(self.layers) ** -0.5))))


class WaveNetLayer(nn.Module):
    """Gated causal convolution with window 2, and the residual and the skip connection."""

    def __init__(self, channels: int, skip_channels: int, dilation: int) -> None:
        super().__init__()
        self.split, self.dilation = [channels, skip_channels], dilation
        self.gate = nn.Linear(2 * channels, 2 * channels)  # of the delayed and the current activations
        self.out = nn.Linear(channels, channels + skip_channels)

    def forward(
        self, x: Float[Tensor, "b t c"], features: Float[Tensor, "b f g"] | None
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t s"]]:
        delayed = F.pad(x, (0, 0, self.dilation, 0))[:, : x.shape[1]]
        gates = self.gate(torch.cat([delayed, x], 2))
        if features is not None:
            # (b, t, g) → (b, f, t / f, g), so that the features of a frame are added to all of its samples
            gates = (gates.unflatten(1, (features.shape[1], -1)) + features[:, :, None]).flatten(1, 2)
        signal, gate = gates.chunk(2, 2)
        residual, skip = self.out(torch.tanh(signal) * torch.sigmoid(gate)).split(self.split, 2)
        return x + residual, skip

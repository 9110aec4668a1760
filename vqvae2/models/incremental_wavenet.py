"""A WaveNet with cached activations, which computes each sample once (Paine et al. 2016, arXiv 1611.09482)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vqvae2.models.wavenet import WaveNet, WaveNetLayer


class IncrementalWaveNet:
    """A WaveNet that computes one sample of a batch at a time.

    Each layer keeps its last inputs, as many as its dilation, in a ring buffer.
    """

    def __init__(self, network: WaveNet, batch: int) -> None:
        self.network, self.time = network, 0
        channels, device = network.config.channels, network.embedding.weight.device
        layers: list[WaveNetLayer] = list(network.layers)  # pyright: ignore[reportAssignmentType]
        self.gate_biases = [layer.gate.bias for layer in layers]
        self.rings = [torch.zeros(layer.dilation, batch, channels, device=device).unbind() for layer in layers]
        self.weights = [
            (layer.gate.weight.T.contiguous(), layer.out.weight.T.contiguous(), layer.out.bias) for layer in layers
        ]
        self.inputs = torch.zeros(batch, 2 * channels, device=device)  # delayed and current activations
        self.delayed, self.current = self.inputs.chunk(2, 1)
        self.gates = torch.zeros(batch, 2 * channels, device=device)
        self.signal, self.gate = self.gates.chunk(2, 1)
        self.outputs = torch.zeros(batch, channels + network.config.skip_channels, device=device)
        self.residual, self.skip = self.outputs.split([channels, network.config.skip_channels], 1)
        self.skips = torch.zeros(batch, network.config.skip_channels, device=device)
        self.begin_frame(None)

    def begin_frame(self, condition: Float[Tensor, "b c"] | None) -> None:
        """Set the conditioning features of the next samples."""
        terms = self.network.layer_conditions(condition)
        self.biases = [
            bias if term is None else bias + term for bias, term in zip(self.gate_biases, terms, strict=True)
        ]

    def logits(self, previous: Int[Tensor, " b"]) -> Float[Tensor, "b 256"]:
        """Return the logits of the next sample, given the value of the previous one, `SILENCE` at the beginning."""
        self.current.copy_(F.embedding(previous, self.network.embedding.weight))
        self.skips.zero_()
        for ring, (gate, out, out_bias), bias in zip(self.rings, self.weights, self.biases, strict=True):
            slot = ring[self.time % len(ring)]
            self.delayed.copy_(slot)
            slot.copy_(self.current)
            torch.addmm(bias, self.inputs, gate, out=self.gates)
            torch.addmm(out_bias, self.signal.tanh_() * self.gate.sigmoid_(), out, out=self.outputs)
            self.current.add_(self.residual)
            self.skips.add_(self.skip)
        self.time += 1
        return self.network.head(self.skips)

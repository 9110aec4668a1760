"""Log-mel spectrograms of waveforms, with one frame for each code."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

BANDS = 32
_WINDOW = 4  # times the hop
_FLOOR = 1e-4  # of the power, about −60 dB below the loudest vowels
_SCALE = 3.0  # so that the values of speech have a variance of about 1


class LogMel(nn.Module):
    """Log-mel spectrogram with a window of four hops, centered at each hop.

    >>> LogMel(sample_rate=8000, hop=64)(torch.zeros(2, 640)).shape
    torch.Size([2, 32, 10])
    """

    filters: Tensor  # (BANDS, F)
    window: Tensor

    def __init__(self, sample_rate: int, hop: int) -> None:
        super().__init__()
        self.hop, size = hop, _WINDOW * hop
        filters = torch.from_numpy(mel_filters(BANDS, size // 2 + 1, sample_rate)).float()
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(size), persistent=False)

    def forward(self, waveform: Float[Tensor, "b t"]) -> Float[Tensor, "b 32 f"]:
        """Return the spectrogram of waveforms whose length is a multiple of the hop."""
        margin = (_WINDOW - 1) * self.hop // 2
        frames = F.pad(waveform, (margin, margin)).unfold(1, _WINDOW * self.hop, self.hop) * self.window
        power = torch.fft.rfft(frames).abs().square()
        return ((power @ self.filters.T + _FLOOR).log() / _SCALE).transpose(1, 2)


def mel_filters(bands: int, bins: int, sample_rate: int) -> Float[np.ndarray, "m f"]:
    """Return triangular filters, equally wide on the mel scale, for the bins of a power spectrum."""
    highest = 2595 * np.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, bands + 2) / 2595) - 1)
    frequencies = np.linspace(0, sample_rate / 2, bins)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return np.clip(np.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle)), 0, None)

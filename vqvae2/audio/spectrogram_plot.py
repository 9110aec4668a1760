"""Pictures of spectrograms."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.signal import spectrogram
from torch import Tensor

from vqvae2.pictures import make_figure, save_figure

_WINDOW, _OVERLAP, _FLOOR = 0.024, 0.75, 60.0  # seconds; fraction of the window; decibels below the maximum


def save_spectrograms(
    path: Path, rows: Sequence[tuple[str, Sequence[tuple[str, Float[Tensor, " t"]]]]], sample_rate: int
) -> None:
    """Write a PNG of spectrograms in decibels: rows of a caption and titled waveforms."""
    columns = max(len(waveforms) for _, waveforms in rows)
    figure = make_figure(1)
    figure.set_size_inches(1.9 * columns + 0.6, 1.5 * len(rows) + 0.3)
    for axes, (caption, waveforms) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        axes[0].set_ylabel(f"{caption}\nkHz", fontsize=8)
        for axis in axes[len(waveforms) :]:
            axis.set_axis_off()
        for axis, (title, waveform) in zip(axes, waveforms, strict=False):
            window = min(round(_WINDOW * sample_rate), len(waveform))
            frequencies, times, power = spectrogram(
                waveform.numpy(), sample_rate, nperseg=window, noverlap=int(_OVERLAP * window), nfft=4 * window
            )
            decibels = 10 * np.log10(power + 1e-12)
            highest, extent = decibels.max(), (0, times[-1], 0, frequencies[-1] / 1000)
            limits = {"vmin": highest - _FLOOR, "vmax": highest}
            axis.imshow(decibels, origin="lower", aspect="auto", extent=extent, cmap="magma", **limits)
            axis.set_title(title, fontsize=8)
            axis.tick_params(labelsize=6)
    save_figure(path, figure, dpi=80)

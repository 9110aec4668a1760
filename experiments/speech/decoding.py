"""Waveforms from codes, and their spectrograms and WAV files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.signal import spectrogram
from torch import Tensor

from experiments.speech.autoencoder import SpeechAutoencoder
from experiments.speech.incremental import sample_waveforms
from experiments.speech.mu_law import expand
from sampling.params import LevelSamplingParams
from sampling.sample_level import Noise, sample_level
from vqvae2 import files
from vqvae2.packages import import_package
from vqvae2.pictures import make_figure
from vqvae2.priors import Prior

_WINDOW, _OVERLAP, _FLOOR = 0.024, 0.75, 60.0  # seconds; fraction of the window; decibels below the maximum


def decode(
    network: SpeechAutoencoder,
    codes: Int[Tensor, "b f"],
    speaker: Int[Tensor, " b"],
    seed: int = 0,
    temperature: float = 1.0,
    clips: Sequence[int] | None = None,
    lengths: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b t"]:
    """Sample waveforms in [-1, 1] from the decoder. See `sample_waveforms`.

    Args:
        lengths: Samples of each clip that were recorded; the rest becomes silent.
    """
    with torch.inference_mode():
        condition, hop = network.condition(codes, speaker), network.config.samples_per_code
    waveforms = expand(sample_waveforms(network.decoder, condition, hop, seed, clips, temperature))
    if lengths is None:
        return waveforms
    return waveforms * (torch.arange(waveforms.shape[1], device=lengths.device) < lengths[:, None])


def sample_utterances(
    network: SpeechAutoencoder,
    prior: Prior,
    labels: Sequence[int],
    classes_per_speaker: int,
    seed: int = 0,
    temperature: float = 1.0,
    params: LevelSamplingParams | None = None,
    clips: Sequence[int] | None = None,
) -> Float[Tensor, "b t"]:
    """Sample codes of the given classes from the prior, and waveforms from the codes.

    Args:
        temperature: Of the waveform; that of the codes is in `params`.
        clips: Numbers of the utterances, on which their noise depends; 0, 1, … if not given.
    """
    device = next(prior.parameters()).device
    label = torch.tensor(labels, device=device)
    clips = range(len(labels)) if clips is None else clips
    codes = sample_level(prior, Noise(seed, clips, level=1), params, labels=label)[:, 0]
    device = network.speaker.weight.device
    return decode(network, codes.to(device), (label // classes_per_speaker).to(device), seed, temperature, clips).cpu()


def save_wav(path: Path, waveform: Float[Tensor, " t"], sample_rate: int) -> None:
    """Write a waveform as a WAV file of 16-bit samples, atomically."""
    with files.atomic_write(path) as partial:
        import_package("soundfile", "speech").write(
            partial, waveform.numpy(), sample_rate, subtype="PCM_16", format="WAV"
        )


def save_spectrograms(
    path: Path, rows: Mapping[str, Sequence[tuple[str, Float[Tensor, " t"]]]], sample_rate: int
) -> None:
    """Write a PNG of spectrograms in decibels: one row per caption, with titled waveforms."""
    columns = max(map(len, rows.values()))
    figure = make_figure(1)
    figure.set_size_inches(1.9 * columns + 0.6, 1.5 * len(rows) + 0.3)
    window = round(_WINDOW * sample_rate)
    for axes, (caption, waveforms) in zip(
        figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True
    ):
        axes[0].set_ylabel(f"{caption}\nkHz", fontsize=8)
        for axis in axes[len(waveforms) :]:
            axis.set_axis_off()
        for axis, (title, waveform) in zip(axes, waveforms, strict=False):
            frequencies, times, power = spectrogram(
                waveform.numpy(), sample_rate, nperseg=window, noverlap=int(_OVERLAP * window), nfft=4 * window
            )
            decibels = 10 * np.log10(power + 1e-12)
            highest, extent = decibels.max(), (0, times[-1], 0, frequencies[-1] / 1000)
            limits = {"vmin": highest - _FLOOR, "vmax": highest}
            axis.imshow(decibels, origin="lower", aspect="auto", extent=extent, cmap="magma", **limits)
            axis.set_title(title, fontsize=8)
            axis.tick_params(labelsize=6)
    with files.atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=80)

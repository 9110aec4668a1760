"""Audio files: reading as mono waveforms of one sample rate, and writing."""

from math import gcd
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.signal import resample_poly
from torch import Tensor

from vqvae2 import files
from vqvae2.errors import UserError, printable
from vqvae2.packages import import_package


def read_waveform(path: Path, sample_rate: int, peak: float | None = None) -> Float[np.ndarray, " t"]:
    """Return the mono float32 waveform of a WAV or FLAC file, in [-1, 1].

    Args:
        sample_rate: Samples per second after resampling.
        peak: Amplitude to which the waveform is scaled; its own if not given.

    Raises:
        UserError: If the file cannot be read or has no samples.
    """
    soundfile = import_package("soundfile", "speech")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        reason = printable(" ".join(str(error).split()))
        raise UserError(f"{path}: not a readable recording ({reason}). Replace or delete it.") from None
    if not len(samples) or not np.isfinite(samples).all():
        problem = "has samples that are not finite" if len(samples) else "has no samples"
        raise UserError(f"{path}: {problem}. Replace or delete it.")
    waveform = samples.mean(1)
    if rate != sample_rate:
        common = gcd(rate, sample_rate)
        waveform = resample_poly(waveform, sample_rate // common, rate // common)
    highest = np.abs(waveform).max()
    scale = peak / highest if peak and highest > 0 else 1.0
    return (waveform * scale).astype(np.float32)


def save_wav(path: Path, waveform: Float[Tensor, " t"], sample_rate: int) -> None:
    """Write a waveform as a WAV file of 16-bit samples, atomically."""
    soundfile = import_package("soundfile", "speech")
    with files.atomic_write(path) as partial:
        soundfile.write(partial, waveform.numpy(), sample_rate, subtype="PCM_16", format="WAV")

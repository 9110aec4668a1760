"""Recognition of contents and speakers: cepstral features and support vector machines trained on real recordings."""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int
from scipy.fft import dct
from scipy.signal import spectrogram

_BANDS, _COEFFICIENTS, _SEGMENTS = 32, 20, 16
_SILENT = 0.01  # of the highest energy of a frame


def mel_filters(bands: int, bins: int, sample_rate: int) -> Float[np.ndarray, "m f"]:
    """Return triangular filters, equally wide on the mel scale, for the bins of a power spectrum."""
    highest = 2595 * np.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, bands + 2) / 2595) - 1)
    frequencies = np.linspace(0, sample_rate / 2, bins)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return np.clip(np.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle)), 0, None)


def cepstra(waveform: Float[np.ndarray, " t"], sample_rate: int) -> Float[np.ndarray, "frames coefficients"]:
    """Return mel-frequency cepstral coefficients of 32 ms windows every 8 ms, without silence at both ends."""
    window = round(0.032 * sample_rate)
    _, _, power = spectrogram(waveform, sample_rate, nperseg=window, noverlap=window - round(0.008 * sample_rate))
    energy = power.sum(0)
    loud = np.flatnonzero(energy > _SILENT * energy.max()) if energy.max() > 0 else np.array([], int)
    if len(loud):
        power = power[:, loud[0] : loud[-1] + 1]
    mel = np.log(mel_filters(_BANDS, len(power), sample_rate) @ power + 1e-9)
    return np.asarray(dct(mel, axis=0, norm="ortho"))[:_COEFFICIENTS].T


def features(waveform: Float[np.ndarray, " t"], sample_rate: int) -> Float[np.ndarray, " d"]:
    """Return the cepstra of a recording, averaged in equally long segments, and their means and deviations."""
    found = cepstra(waveform, sample_rate)
    bounds = np.linspace(0, len(found), _SEGMENTS + 1)
    segments = [found[int(a) : max(int(np.ceil(b)), int(a) + 1)].mean(0) for a, b in pairwise(bounds)]
    return np.concatenate([*segments, found.mean(0), found.std(0)])


class Recognizer:
    """A classifier of waveforms."""

    def __init__(self, waveforms: Iterable[np.ndarray], labels: Int[np.ndarray, " n"], sample_rate: int) -> None:
        from sklearn.pipeline import make_pipeline  # imported here, because only the evaluation needs the package
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC

        self.sample_rate = sample_rate
        self.classifier = make_pipeline(StandardScaler(), SVC(C=10))
        self.classifier.fit(self._features(waveforms), labels)

    def accuracy(self, waveforms: Iterable[np.ndarray], labels: Int[np.ndarray, " n"]) -> float:
        """Return the fraction of waveforms that are recognized as their label."""
        return float(np.mean(self.classifier.predict(self._features(waveforms)) == labels))

    def _features(self, waveforms: Iterable[np.ndarray]) -> np.ndarray:
        return np.stack([features(waveform, self.sample_rate) for waveform in waveforms])


def mutual_information(first: Int[np.ndarray, " n"], second: Int[np.ndarray, " n"]) -> float:
    """Return the mutual information of paired labels in bits, estimated from their joint frequencies."""
    joint = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(joint, (first, second), 1 / len(first))
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())

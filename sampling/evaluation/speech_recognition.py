"""Recognition of contents and speakers: cepstral features, and support vector machines trained on real recordings."""

from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.fft import dct
from torch import Tensor

from vqvae2.audio.log_mel import LogMel
from vqvae2.packages import import_package

_COEFFICIENTS, _SEGMENTS = 20, 16
_SILENT = 1.0  # below the loudest frame, in units of the spectrogram


def cepstra(waveform: Float[np.ndarray, " t"], sample_rate: int) -> Float[np.ndarray, "frames coefficients"]:
    """Return mel-frequency cepstral coefficients of 32 ms windows every 8 ms, without silence at both ends."""
    hop = round(0.008 * sample_rate)
    padded = np.pad(waveform, (0, max(0, hop - len(waveform))))  # to one window at least
    samples = torch.from_numpy(padded[: len(padded) // hop * hop])
    mel = LogMel(sample_rate, hop)(samples[None])[0].numpy()
    loudness = mel.mean(0)
    loud = np.flatnonzero(loudness > loudness.max() - _SILENT)
    return np.asarray(dct(mel[:, loud[0] : loud[-1] + 1], axis=0, norm="ortho"))[:_COEFFICIENTS].T


def features(waveform: Float[np.ndarray, " t"], sample_rate: int) -> Float[np.ndarray, " d"]:
    """Return the cepstra of a recording, averaged in equally long segments, and their means and deviations."""
    found = cepstra(waveform, sample_rate)
    bounds = np.linspace(0, len(found), _SEGMENTS + 1)
    segments = [found[int(a) : max(int(np.ceil(b)), int(a) + 1)].mean(0) for a, b in pairwise(bounds)]
    return np.concatenate([*segments, found.mean(0), found.std(0)])


class SpeechRecognizer:
    """A classifier of waveforms."""

    def __init__(self, waveforms: Iterable[np.ndarray], labels: Int[np.ndarray, " n"], sample_rate: int) -> None:
        scaler, classifier = (
            import_package("sklearn.preprocessing", "speech").StandardScaler(),
            import_package("sklearn.svm", "speech").SVC(C=10),
        )
        self.sample_rate = sample_rate
        self.classifier = import_package("sklearn.pipeline", "speech").make_pipeline(scaler, classifier)
        self.classifier.fit(self._features(waveforms), labels)

    def accuracy(self, waveforms: Iterable[np.ndarray], labels: Int[np.ndarray, " n"]) -> float:
        """Return the fraction of waveforms that are recognized as their label."""
        return float(np.mean(self.classifier.predict(self._features(waveforms)) == labels))

    def _features(self, waveforms: Iterable[np.ndarray]) -> np.ndarray:
        return np.stack([features(waveform, self.sample_rate) for waveform in waveforms])


def recognize(
    waveforms: Float[Tensor, "n t"],
    labels: Int[Tensor, " n"],
    sets: Mapping[str, tuple[Float[Tensor, "m t"], Int[Tensor, " m"]]],
    sample_rate: int,
) -> dict[str, float] | None:
    """Return the fraction of waveforms of each set that are recognized as their label, None if there is one label only.

    Args:
        waveforms: Real recordings, on which the classifier is trained.
        labels: Their labels.
        sets: Waveforms to recognize, and their labels.
    """
    if len(labels.unique()) < 2:
        return None
    recognizer = SpeechRecognizer(waveforms.numpy(), labels.numpy(), sample_rate)
    return {name: recognizer.accuracy(each.numpy(), label.numpy()) for name, (each, label) in sets.items()}

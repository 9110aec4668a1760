"""Test µ-law companding, log-mel spectrograms and audio files."""

import re
from pathlib import Path

import numpy as np
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from sampling.report.audio_page import write_audio, write_audio_page
from tests.test_commands import contents
from vqvae2.audio.audio_io import read_waveform, save_wav
from vqvae2.audio.log_mel import LogMel, mel_filters
from vqvae2.audio.mu_law import compand, expand
from vqvae2.audio.spectrogram_plot import save_spectrograms
from vqvae2.pictures import load_image


def test_mu_law_is_the_formula() -> None:
    x = np.linspace(-1, 1, 4001)
    companded = np.sign(x) * np.log(1 + 255 * np.abs(x)) / np.log(256)
    expected = np.floor((companded + 1) / 2 * 255 + 0.5)
    found = compand(torch.from_numpy(x)).numpy()
    assert (found != expected).mean() < 1e-3  # values on the border between two steps
    assert np.abs(found.astype(int) - expected).max() <= 1
    y = np.arange(256) / 255 * 2 - 1
    waveform = np.sign(y) * (256 ** np.abs(y) - 1) / 255
    np.testing.assert_allclose(expand(torch.arange(256)).numpy(), waveform, atol=1e-6)


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20))
def test_mu_law_round_trip(samples: list[float]) -> None:
    waveform = torch.tensor(samples)
    found = compand(waveform)
    assert torch.equal(compand(expand(found)), found)
    # A step is at most ln(256) · 2 / 255 times (|x| + 1 / 255) wide, and values are rounded to its middle.
    assert ((expand(found) - waveform.clamp(-1, 1)).abs() <= 0.023 * (waveform.abs().clamp(max=1) + 1 / 255)).all()


def test_log_mel_is_the_formula() -> None:
    sample_rate, hop = 8000, 64
    waveform = np.random.default_rng(0).standard_normal(640).astype(np.float32)
    found = LogMel(sample_rate, hop)(torch.from_numpy(waveform)[None])[0].numpy()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    padded = np.pad(waveform, 96)
    for frame in range(10):
        power = np.abs(np.fft.rfft(padded[frame * hop : frame * hop + 256] * window)) ** 2
        expected = np.log(mel_filters(32, 129, sample_rate) @ power + 1e-4) / 3
        np.testing.assert_allclose(found[:, frame], expected, atol=1e-4)


def test_mel_filters_are_triangles_on_the_mel_scale() -> None:
    filters = mel_filters(20, 2001, 8000)  # bins of 2 Hz
    peaks = filters.argmax(1) * 2.0
    mel = 2595 * np.log10(1 + peaks / 700)
    np.testing.assert_allclose(np.diff(mel), np.diff(mel).mean(), rtol=0.05)
    inside = slice(filters[0].argmax() + 1, filters[-1].argmax())
    np.testing.assert_allclose(filters[:, inside].sum(0), 1, atol=1e-6)  # neighbors overlap completely


def test_waveforms_are_mono_resampled_and_scaled(tmp_path: Path) -> None:
    time = np.arange(24_000) / 48_000
    stereo = np.stack([0.2 * np.sin(2 * np.pi * 440 * time), np.zeros_like(time)], 1)
    soundfile.write(tmp_path / "x.flac", stereo, 48_000)
    waveform = read_waveform(tmp_path / "x.flac", sample_rate=8000)
    assert waveform.shape == (4000,)
    expected = 0.1 * np.sin(2 * np.pi * 440 * np.arange(4000) / 8000)
    np.testing.assert_allclose(waveform[100:-100], expected[100:-100], atol=2e-3)
    scaled = read_waveform(tmp_path / "x.flac", sample_rate=8000, peak=0.5)
    assert abs(np.abs(scaled).max() - 0.5) < 1e-6


def test_saved_waveform_is_read_back(tmp_path: Path) -> None:
    waveform = torch.rand(1000) * 2 - 1
    save_wav(tmp_path / "x.wav", waveform, 8000)
    np.testing.assert_allclose(read_waveform(tmp_path / "x.wav", sample_rate=8000), waveform.numpy(), atol=2**-15)


def test_spectrograms_of_short_waveforms_and_equal_captions(tmp_path: Path) -> None:
    row = ("anna", [("original", torch.linspace(-1, 1, 64))])  # shorter than the window
    heights = []
    for rows in ([row], [row, row]):
        save_spectrograms(tmp_path / "rows.png", rows, 16_000)
        heights.append(load_image(tmp_path / "rows.png").shape[1])
    assert heights[1] > 1.5 * heights[0]


def test_writing_audio_again_keeps_earlier_files(tmp_path: Path) -> None:
    cells, first = [("original", torch.zeros(64)), ("as ben", torch.zeros(64))], tmp_path / "samples"
    assert write_audio(first, [("anna", cells)] * 2, 8000, seed=0, temperature=1, networks=[]) == first
    before = contents(first)
    second = write_audio(first, [("anna", cells[:1])], 8000, seed=0, temperature=1, networks=[])
    assert second == tmp_path / "samples-2"
    assert contents(first) == before
    write_audio_page(tmp_path / "page.html", "Speech", {"Samples": "samples"})
    sources = re.findall(r'audio controls preload="none" src="([^"]+)"', (tmp_path / "page.html").read_text())
    assert len(sources) == 5
    assert sources[-1] == "samples-2/000-00.wav"

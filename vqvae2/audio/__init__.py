"""Waveforms: audio files, companding, spectrograms."""

"""µ-law companding of waveforms to 256 values (van den Oord et al. 2016, arXiv 1609.03499, section 2.2)."""

import math

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

NUM_VALUES = 256
SILENCE = 128  # value of 0
_MU = NUM_VALUES - 1


def compand(waveform: Float[Tensor, "*b"]) -> UInt8[Tensor, "*b"]:
    """Return the values 0 to 255 of a waveform in [-1, 1]: sign(x) · ln(1 + µ|x|) / ln(1 + µ), rounded to 256 steps.

    >>> compand(torch.tensor([-1.0, 0.0, 0.01, 1.0]))
    tensor([  0, 128, 157, 255], dtype=torch.uint8)
    """
    waveform = waveform.clamp(-1, 1)
    companded = waveform.sign() * torch.log1p(_MU * waveform.abs()) / math.log1p(_MU)
    return ((companded + 1) / 2 * _MU + 0.5).floor().to(torch.uint8)


def to_unit(values: Integer[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Return values scaled to [-1, 1] without expanding them, as network inputs."""
    return values.float() * (2 / _MU) - 1


def expand(values: Integer[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Return the waveform in [-1, 1] of values: sign(y) · ((1 + µ)^|y| − 1) / µ."""
    companded = to_unit(values)
    return companded.sign() * torch.expm1(companded.abs() * math.log1p(_MU)) / _MU

"""Quantizers. To add one, add a file with its config and quantizer, and the config to `QuantizerConfig`."""

from typing import Annotated

from pydantic import Field

from vqvae2.quantizers.base import Quantizer, QuantizerOutput
from vqvae2.quantizers.ema import EMAConfig, EMAQuantizer
from vqvae2.quantizers.fsq import FSQConfig, FSQuantizer
from vqvae2.quantizers.gradient import GradientConfig, GradientQuantizer

QuantizerConfig = Annotated[EMAConfig | GradientConfig | FSQConfig, Field(discriminator="kind")]

__all__ = [
    "EMAConfig",
    "EMAQuantizer",
    "FSQConfig",
    "FSQuantizer",
    "GradientConfig",
    "GradientQuantizer",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerOutput",
]

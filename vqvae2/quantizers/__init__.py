"""Quantizers. To add one, add a file with its config and quantizer, and the config to `QuantizerConfig`."""

from typing import Annotated

from pydantic import Field

from vqvae2.quantizers.base import Quantizer, QuantizerOutput
from vqvae2.quantizers.ema import EMAConfig, EMAQuantizer
from vqvae2.quantizers.external import ExternalConfig, ExternalQuantizer
from vqvae2.quantizers.fsq import FSQConfig, FSQuantizer
from vqvae2.quantizers.gradient import GradientConfig, GradientQuantizer
from vqvae2.quantizers.simvq import SimVQConfig, SimVQuantizer

QuantizerConfig = Annotated[
    EMAConfig | GradientConfig | SimVQConfig | FSQConfig | ExternalConfig, Field(discriminator="kind")
]

__all__ = [
    "EMAConfig",
    "EMAQuantizer",
    "ExternalConfig",
    "ExternalQuantizer",
    "FSQConfig",
    "FSQuantizer",
    "GradientConfig",
    "GradientQuantizer",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "SimVQConfig",
    "SimVQuantizer",
]

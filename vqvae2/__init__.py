"""Hierarchical VQ-VAE-2: quantizers, autoencoder, priors, code store and metrics.

Classes are imported on first use, so that `vqvae2 --help` does not have to load torch.

    >>> import torch
    >>> from vqvae2 import Autoencoder, AutoencoderConfig
    >>> model = AutoencoderConfig(channels=16, residual_channels=8).build(size=(64, 64)).eval()
    >>> bottom, top = model.encode(torch.zeros(2, 3, 64, 64))
    >>> tuple(bottom.shape), tuple(top.shape)
    ((2, 16, 16), (2, 8, 8))
    >>> tuple(model.decode((bottom, top)).shape)
    (2, 3, 64, 64)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqvae2.data.code_store import CodeStore
    from vqvae2.data.images import DataConfig
    from vqvae2.errors import UserError
    from vqvae2.models import Autoencoder, AutoencoderConfig, LevelConfig
    from vqvae2.priors import PixelCNNConfig, PixelSNAILConfig, Prior, PriorSpec, TransformerConfig
    from vqvae2.quantizers import EMAConfig, ExternalConfig, FSQConfig, GradientConfig, SimVQConfig

_MODULES = {
    "Autoencoder": "vqvae2.models",
    "AutoencoderConfig": "vqvae2.models",
    "CodeStore": "vqvae2.data.code_store",
    "DataConfig": "vqvae2.data.images",
    "EMAConfig": "vqvae2.quantizers",
    "ExternalConfig": "vqvae2.quantizers",
    "FSQConfig": "vqvae2.quantizers",
    "GradientConfig": "vqvae2.quantizers",
    "LevelConfig": "vqvae2.models",
    "PixelCNNConfig": "vqvae2.priors",
    "PixelSNAILConfig": "vqvae2.priors",
    "Prior": "vqvae2.priors",
    "PriorSpec": "vqvae2.priors",
    "SimVQConfig": "vqvae2.quantizers",
    "TransformerConfig": "vqvae2.priors",
    "UserError": "vqvae2.errors",
}
__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "CodeStore",
    "DataConfig",
    "EMAConfig",
    "ExternalConfig",
    "FSQConfig",
    "GradientConfig",
    "LevelConfig",
    "PixelCNNConfig",
    "PixelSNAILConfig",
    "Prior",
    "PriorSpec",
    "SimVQConfig",
    "TransformerConfig",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)

"""Priors over code maps. To add one, add a file with its config and network, and the config to `PriorConfig`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from vqvae2 import checkpoint, files
from vqvae2.config import Config
from vqvae2.priors.base import IncrementalDecoder, Prior, PriorSpec
from vqvae2.priors.pixelcnn import PixelCNN, PixelCNNConfig
from vqvae2.priors.pixelsnail import PixelSNAIL, PixelSNAILConfig
from vqvae2.priors.transformer import Transformer, TransformerConfig

PriorConfig = Annotated[PixelSNAILConfig | PixelCNNConfig | TransformerConfig, Field(discriminator="kind")]


class _StoredPrior(Config):
    """Metadata of a prior's weights file."""

    network: Literal["prior"] = "prior"
    config: PriorConfig
    spec: PriorSpec
    made_from: dict[str, Any] = Field(default_factory=dict)


def save_prior(
    path: Path, prior: Prior, config: PriorConfig, dtype: torch.dtype | None = None, **made_from: Any
) -> None:
    """Write weights, config, spec and provenance (`made_from`, JSON-serializable) to one safetensors file.

    Weights are converted to `dtype`, if given. They are float32 again once they are loaded.
    """
    stored = _StoredPrior(config=config, spec=prior.spec, made_from=made_from)
    checkpoint.save(path, prior.state_dict(), stored.to_dict(), dtype)


def load_prior(path: Path, device: torch.device | str = "cpu") -> Prior:
    """Load a file written by `save_prior`. Returns the prior in evaluation mode, with its `made_from` and `digest`.

    Raises:
        UserError: If the file is missing, corrupted or not a prior.
    """
    tensors, metadata = checkpoint.load(path, "prior")
    stored = _StoredPrior.from_dict(metadata, str(path))
    prior: Prior = checkpoint.build_module(lambda: stored.config.build(stored.spec), tensors, path)
    prior.digest, prior.made_from = files.digest(path), stored.made_from
    return prior.to(device).eval().requires_grad_(False)


__all__ = [
    "IncrementalDecoder",
    "PixelCNN",
    "PixelCNNConfig",
    "PixelSNAIL",
    "PixelSNAILConfig",
    "Prior",
    "PriorConfig",
    "PriorSpec",
    "Transformer",
    "TransformerConfig",
    "load_prior",
    "save_prior",
]

"""Priors over code maps. A new one is a file here and its config in this union."""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from vqvae2 import checkpoint, files
from vqvae2.config import Config
from vqvae2.errors import UserError
from vqvae2.priors.base import IncrementalDecoder, Prior, PriorSpec
from vqvae2.priors.pixelcnn import PixelCNN, PixelCNNConfig
from vqvae2.priors.pixelsnail import PixelSNAIL, PixelSNAILConfig
from vqvae2.priors.transformer import Transformer, TransformerConfig

PriorConfig = Annotated[PixelSNAILConfig | PixelCNNConfig | TransformerConfig, Field(discriminator="kind")]


class _Stored(Config):
    """What a prior's weights file says of it."""

    network: str
    config: PriorConfig
    spec: PriorSpec
    made_from: dict[str, Any] = Field(default_factory=dict)


def save_prior(path: Path, prior: Prior, config: PriorConfig, **made_from: Any) -> None:
    """Write weights, config, spec and what they were made from to one safetensors file."""
    stored = _Stored(network="prior", config=config, spec=prior.spec, made_from=made_from)
    checkpoint.save(path, prior.state_dict(), stored.plain())


def load_prior(path: Path, device: torch.device | str = "cpu") -> Prior:
    """The prior in a file that `save_prior` wrote, in evaluation mode, with its `made_from` and `digest`."""
    tensors, metadata = checkpoint.load(path)
    if metadata.get("network") != "prior":
        raise UserError(f"{path}: holds an {metadata.get('network')}, not a prior")
    stored = _Stored.parse(metadata, str(path))
    with torch.device("meta"):
        prior = stored.config.build(stored.spec)
    prior = prior.to_empty(device="cpu")
    checkpoint.load_state_dict(prior, tensors, path)
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

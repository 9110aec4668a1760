"""Hierarchical VQ-VAE-2: quantizers, autoencoder, priors, code store, metrics.

model = vqvae2.load("runs/demo/autoencoder")     # a folder, a .safetensors file or a hub id; evaluation mode
codes = model.encode(images)                     # float32 (B, C, H, W) in [-1, 1] → integer maps, finest first
images = model.decode(codes)
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from vqvae2.models import Autoencoder

__all__ = ["load"]


def load(source: str | Path, device: "torch.device | str" = "cpu") -> "Autoencoder":
    """The trained autoencoder in a weights file, in a folder, or on the hub (`owner/name`), in evaluation mode."""
    # Imported here: the command line imports this package for every command, and torch takes seconds.
    from vqvae2.hub import weights_file
    from vqvae2.models import Autoencoder

    return Autoencoder.load(weights_file(source), device)

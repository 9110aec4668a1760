"""Features of pretrained networks beside Inception: DINOv2, EfficientNet-Lite, and all image networks of timm.

In Stein et al. 2023 (arXiv 2306.04675), the Fréchet distance in the features of DINOv2 agrees best with people.
EfficientNet-Lite needs no download.
"""

import importlib
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from pydantic import AfterValidator
from torch import Tensor, nn

from vqvae2.checkpoint import read_state_dict
from vqvae2.errors import UserError
from vqvae2.files import digest
from vqvae2.hub import download_file
from vqvae2.metrics import efficientnet_lite
from vqvae2.metrics.feature_extractor import FeatureExtractor, FeatureOutput, WeightsUnavailableError, check_images
from vqvae2.metrics.inception import load_inception

_DINOV2, _DINOV2_SIZE = "vit_large_patch14_dinov2.lvd142m", 224  # as in Stein et al.
_OPTION = "--features"
INCEPTION = "inception"


class FeatureNetwork(NamedTuple):
    """A network by name, and optionally a file with its weights. Written as NAME or NAME=FILE."""

    name: str
    weights: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the network that a text names.

        Raises:
            ValueError: If the text does not start with the name of a network.
        """
        name, separator, weights = text.partition("=")
        known = ("dinov2", *efficientnet_lite.NAMES)
        if name not in known and not name.startswith("timm:"):
            raise ValueError(f"no network {name!r}; the networks are {', '.join((INCEPTION, *known, 'timm:NAME'))}")
        return cls(name, Path(weights).expanduser() if separator else None)

    def load(self, device: torch.device | str = "cpu") -> "PretrainedFeatures":
        """Load the network.

        Raises:
            WeightsUnavailableError: If a package is missing, or weights cannot be downloaded.
            UserError: If the weights file is not one of this network.
        """
        load = _load_efficientnet if self.name in efficientnet_lite.NAMES else _load_timm
        return load(self).to(device)


def _check_network(text: str) -> str:
    if text != INCEPTION:
        FeatureNetwork.parse(text)
    return text


# A setting: `inception`, or what `FeatureNetwork.parse` reads.
NetworkSetting = Annotated[str, AfterValidator(_check_network)]
NETWORKS_HELP = (
    "inception, dinov2, efficientnet-lite2, efficientnet-lite0 or timm:NAME; NAME=FILE for weights in a file"
)


def load_extractor(
    network: str, inception_weights: Path | None = None, device: torch.device | str = "cpu", dims: int = 2048
) -> FeatureExtractor:
    """Load the network of a `NetworkSetting`. `inception_weights` and `dims` are for Inception only.

    Raises:
        WeightsUnavailableError: If a package is missing, or weights were not given and cannot be downloaded.
        UserError: If the weights file is not one of this network.
    """
    if network == INCEPTION:
        return load_inception(inception_weights, dims, device)
    return FeatureNetwork.parse(network).load(device)


class PretrainedFeatures(FeatureExtractor):
    """A pretrained network from normalized images to features.

    Images are scaled to [0, 1], resized to `size` by bicubic interpolation with antialiasing, clamped, and normalized
    to (x - `mean`) / `std` as in the training of the network.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, network: nn.Module, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.name, self.size = name, size
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        with torch.inference_mode():
            self.dims = network(torch.zeros(1, 3, *size)).shape[1]

    @torch.inference_mode()
    def forward(self, images: UInt8[Tensor, "n 3 h w"], logits: bool = False) -> FeatureOutput:
        check_images(images)
        if logits:
            raise ValueError(f"{self.name} has no logits; only Inception has")
        x = images.to(self.device).float() / 255
        x = F.interpolate(x, size=self.size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        return FeatureOutput(self.network((x - self.mean) / self.std).float())


class _PooledFeatures(nn.Module):
    """The last feature maps of an EfficientNet-Lite, averaged over positions."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.extract_features(x).mean((2, 3))


def _load_efficientnet(source: FeatureNetwork) -> PretrainedFeatures:
    try:
        loaded = efficientnet_lite.load_efficientnet_lite(source.name, source.weights, _OPTION)
    except efficientnet_lite.NotInstalledError as error:
        raise WeightsUnavailableError(str(error)) from None
    mean, std = ((value / 255,) * 3 for value in (efficientnet_lite.MEAN, efficientnet_lite.STD))
    size = (loaded.image_size, loaded.image_size)
    extractor = PretrainedFeatures(source.name, _PooledFeatures(loaded.network), size, mean, std)
    extractor.weights_digest, extractor.is_standard = loaded.weights_digest, loaded.is_standard
    return extractor


def _load_timm(source: FeatureNetwork) -> PretrainedFeatures:
    """Load a network of timm. DINOv2 is one of them; its features are those of the class token."""
    try:
        timm: Any = importlib.import_module("timm")  # slow to import, used by few commands
    except ImportError:
        raise WeightsUnavailableError(
            f"{_OPTION}: {source.name} needs the package timm; pip install 'vqvae2[features]'."
        ) from None
    model = _DINOV2 if source.name == "dinov2" else source.name.removeprefix("timm:")
    if not timm.is_model(model.partition(".")[0]):
        raise UserError(f"{_OPTION} {source.name}: timm has no network {model!r}. See timm.list_models().")
    path = source.weights or _download(source.name, timm.get_pretrained_cfg(model))
    state = read_state_dict(path, f"{_OPTION} {source.name}", "Give a file of the network's weights.")
    settings = {"img_size": _DINOV2_SIZE} if source.name == "dinov2" else {}
    try:
        network: Any = timm.create_model(
            model, pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **settings
        )
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{_OPTION} {source.name}: {path}: not weights of {model} ({reason}).") from None
    network.reset_classifier(0)
    config = timm.data.resolve_model_data_config(network)
    size = (_DINOV2_SIZE, _DINOV2_SIZE) if settings else config["input_size"][1:]
    extractor = PretrainedFeatures(source.name, network, size, config["mean"], config["std"])
    extractor.weights_digest, extractor.is_standard = digest(path), source.weights is None
    return extractor


def _download(name: str, config: Any) -> Path:
    """Return the weights file of a timm network from the cache of the Hugging Face hub, downloading it if needed."""
    if config is None or not config.hf_hub_id:
        raise UserError(f"{_OPTION} {name}: timm has no weights of it on the hub. Give a file: {name}=FILE.")
    repository, _, _ = str(config.hf_hub_id).partition("@")
    try:
        return download_file(repository, config.hf_hub_filename or "model.safetensors")
    except UserError as error:
        raise WeightsUnavailableError(
            f"cannot download the weights of {name} ({error}). Get model.safetensors from "
            f"https://huggingface.co/{repository} and give it as {name}=FILE."
        ) from None

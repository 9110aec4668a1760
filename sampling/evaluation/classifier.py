"""Image classifiers that score samples: torchvision models by name, or classifiers trained by this project.

`LabeledSamples` reads the images that such a classifier scores or is trained on, with the labels of the manifest.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from sampling.output_folder import SampleManifest, image_path, read_manifest
from vqvae2 import checkpoint, files
from vqvae2.config import Config
from vqvae2.data.images import ImageSample, read_image, to_float
from vqvae2.downloads import torchvision_weights
from vqvae2.errors import UserError
from vqvae2.pictures import hwc_to_chw

SMALL_IMAGE_SIZE = 64  # pixels; up to this height and width the first layer does not downsample
Architecture = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]

_OWN_CLASSIFIER = "a .safetensors file written by `vqvae2 evaluate RUN --cas.enabled --cas.real`"


class ClassifierConfig(Config):
    """Architecture of a classifier trained by this project; stored in its weights file."""

    architecture: Architecture
    classes: tuple[str, ...] = Field(min_length=2)
    size: tuple[int, int] = Field(description="height and width of the input images in pixels")

    def build(self) -> nn.Module:
        """Build torchvision's network; for small images the first layer is a 3×3 convolution without pooling."""
        network: Any = torchvision.models.get_model(self.architecture, weights=None, num_classes=len(self.classes))
        if max(self.size) <= SMALL_IMAGE_SIZE:
            network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
            network.maxpool = nn.Identity()
        built: nn.Module = network
        return built


@dataclass(frozen=True)
class Classifier:
    """A network in evaluation mode, with its preprocessing and its class names."""

    network: nn.Module
    preprocess: Callable[[Tensor], Tensor]  # from uint8 (N, 3, H, W) in [0, 255] to the input of the network
    classes: tuple[str, ...]
    source: str  # torchvision name or path of the weights file
    digest: str  # SHA-256 of the weights file
    matches_by_index: bool = False  # whether a run's classes are matched to `classes` by index instead of by name

    @classmethod
    def from_network(cls, network: nn.Module, config: ClassifierConfig, source: str, digest: str = "") -> "Classifier":
        """Wrap a network built by `config` with the preprocessing used in its training."""

        def preprocess(images: Tensor) -> Tensor:
            pixels = to_float(images)
            if pixels.shape[2:] == config.size:
                return pixels
            return F.interpolate(pixels, config.size, mode="bilinear", antialias=True, align_corners=False)

        return cls(network.eval(), preprocess, config.classes, source, digest)

    @torch.inference_mode()
    def log_probs(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n k"]:
        """Return the natural logarithm of the probability of each class."""
        device = next(self.network.parameters()).device
        return self.network(self.preprocess(images.to(device))).float().log_softmax(1)

    def class_indices(self, classes: Sequence[str]) -> list[int]:
        """Return the index in the classifier's output of each class of a run.

        Raises:
            UserError: If the classifier lacks a class, or, for a torchvision model, has another number of classes.
        """
        option = f"--classifier {self.source}"
        if self.matches_by_index:
            # ImageNet folders are named by WordNet IDs, and torchvision's classes are in the order of these IDs.
            if len(classes) != len(self.classes):
                raise UserError(
                    f"{option}: this model has {len(self.classes)} classes, but the run has {len(classes)}. "
                    f"Use {_OWN_CLASSIFIER}."
                )
            return list(range(len(classes)))
        indices = {name: index for index, name in enumerate(self.classes)}
        for name in classes:
            if name not in indices:
                raise UserError(f"{option}: the run's class {name!r} is missing. Train a classifier on this run.")
        return [indices[name] for name in classes]


def load_classifier(source: str, device: torch.device | str = "cpu") -> Classifier:
    """Load a torchvision classifier with its default weights by name, or a file written by `save_classifier`.

    Raises:
        UserError: If `source` is neither, if the weights cannot be downloaded, or if the file is damaged.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if source in names:
        return _from_torchvision(source, torch.device(device))
    path = Path(source)
    if path.is_file():
        return _from_file(path, torch.device(device))
    close = difflib.get_close_matches(source, names, 1) or ["resnet50"]
    problem = "is a folder" if path.is_dir() else "neither a file nor a torchvision classifier"
    raise UserError(f"--classifier {source}: {problem}. Use {_OWN_CLASSIFIER}, or a name such as {close[0]}.")


def save_classifier(path: Path, network: nn.Module, config: ClassifierConfig, made_from: dict[str, Any]) -> None:
    """Write weights, config and a record of the training data to one safetensors file."""
    checkpoint.save_module(path, "classifier", network, config, made_from)


def _from_file(path: Path, device: torch.device) -> Classifier:
    if path.suffix != ".safetensors":
        raise UserError(f"--classifier {path}: only safetensors files are supported. Use {_OWN_CLASSIFIER}.")
    tensors, metadata = checkpoint.load(path)
    if metadata.get("network") != "classifier":
        raise UserError(
            f"{path}: expected the weights of a classifier, found {metadata.get('network')}. Use {_OWN_CLASSIFIER}."
        )
    config = ClassifierConfig.from_dict(metadata.get("config"), str(path))
    network = checkpoint.build_module(config.build, tensors, path).to(device).requires_grad_(False)
    return Classifier.from_network(network, config, str(path), files.digest(path))


def _from_torchvision(name: str, device: torch.device) -> Classifier:
    # Load the file as tensors only. get_model would unpickle anything, but then finds the verified file in the cache.
    weights = torchvision_weights(name, label=f"--classifier {name}", alternative=f"use {_OWN_CLASSIFIER}")
    network = torchvision.models.get_model(name, weights=weights.entry, progress=False)
    network = network.to(device).eval().requires_grad_(False)
    categories, digest = tuple(weights.entry.meta["categories"]), files.digest(weights.path)
    return Classifier(network, weights.entry.transforms(), categories, name, digest, matches_by_index=True)


class LabeledSamples(Dataset[ImageSample]):
    """The RGB images in a folder written by `vqvae2 sample`, with the labels they were sampled for.

    Raises:
        UserError: If the folder has no manifest or no labels, or images are missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_manifest(folder, SampleManifest)
        if manifest is None:
            raise UserError(f"{folder}: no samples found. Create them with `vqvae2 sample`.")
        if not manifest.labels:
            raise UserError(f"{folder}: samples have no labels. This requires a run with `data.labels: folder`.")
        self.manifest, self.labels = manifest, manifest.labels
        self.classes, self.size = manifest.class_names, manifest.image_size
        missing = [index for index in range(len(self.labels)) if not self.path(index).is_file()]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(self.labels)} images are missing, the first is "
                f"{self.path(missing[0]).name}. Rerun the `vqvae2 sample` command that created the folder."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> ImageSample:
        pixels = hwc_to_chw(read_image(self.path(index), self.size, channels=4))
        return ImageSample(pixels[:3], self.labels[index])  # without alpha, as `to_rgb`

    def path(self, index: int) -> Path:
        """Return the path of an image."""
        return image_path(self.folder, index, self.manifest.format)

"""Image classifiers as judges of samples: torchvision's, by name, or one trained for the classification accuracy score.

Beside them the samples that they judge or learn from: what `vqvae2 sample` wrote, with the label of each image.
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

from vqvae2 import checkpoint, files
from vqvae2.config import Config
from vqvae2.data.images import ImageSample, read_image, to_float
from vqvae2.downloads import torchvision_weights
from vqvae2.errors import UserError
from vqvae2.pictures import hwc_to_chw

SMALL = 64  # images up to this side keep their size in the first layer
Architecture = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]

_OWN = "a .safetensors file that `vqvae2 evaluate RUN --cas --cas-real` made"


class ClassifierSpec(Config):
    """What a classifier of this project is built from; its file keeps it."""

    architecture: Architecture
    classes: tuple[str, ...] = Field(min_length=2)
    size: tuple[int, int] = Field(description="height and width of the images it sees, in pixels")

    def build(self) -> nn.Module:
        """torchvision's network; for small images its first layer is 3×3 of stride 1, and no pooling follows."""
        network: Any = torchvision.models.get_model(self.architecture, weights=None, num_classes=len(self.classes))
        if max(self.size) <= SMALL:
            network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
            network.maxpool = nn.Identity()
        built: nn.Module = network
        return built


@dataclass(frozen=True)
class Classifier:
    """A network with its preprocessing and its classes; in evaluation mode."""

    network: nn.Module
    preprocess: Callable[[Tensor], Tensor]  # uint8 (N, 3, H, W), 0 … 255, to what the network takes
    classes: tuple[str, ...]
    source: str
    digest: str  # SHA-256 of its weights file
    by_place: bool = False  # whether its classes are told by place and not by name

    @torch.inference_mode()
    def log_probabilities(self, images: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n k"]:
        """Natural logarithms of the probability of each class."""
        device = next(self.network.parameters()).device
        return self.network(self.preprocess(images.to(device))).float().log_softmax(1)

    def columns(self, classes: Sequence[str]) -> list[int]:
        """Where each of a run's classes is among this classifier's; UserError where it knows too few."""
        where = f"--classifier {self.source}"
        if self.by_place:
            # ImageNet's folders are named by WordNet ids, whose sorted order is the order of these classes.
            if len(classes) != len(self.classes):
                raise UserError(f"{where}: tells {len(self.classes)} classes, the run has {len(classes)}; give {_OWN}")
            return list(range(len(classes)))
        places = {name: place for place, name in enumerate(self.classes)}
        for name in classes:
            if name not in places:
                raise UserError(f"{where}: does not know the run's class {name!r}; train one on this run's images")
        return [places[name] for name in classes]


def load_classifier(source: str, device: torch.device | str = "cpu") -> Classifier:
    """A torchvision classifier by name, with its default weights, or one from a file that `save_classifier` wrote.

    Raises UserError where there is neither, where the weights can neither be found nor downloaded, or are damaged.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if source in names:
        return _from_torchvision(source, torch.device(device))
    path = Path(source)
    if path.is_file():
        return _from_file(path, torch.device(device))
    close = difflib.get_close_matches(source, names, 1) or ["resnet50"]
    what = "a folder" if path.is_dir() else "neither a file nor a classifier of torchvision"
    raise UserError(f"--classifier {source}: {what}; give {_OWN}, or a name such as {close[0]}")


def save_classifier(path: Path, network: nn.Module, spec: ClassifierSpec, made_from: dict[str, Any]) -> None:
    """Write weights, what builds the network, and what it was trained on, to one safetensors file."""
    metadata = {"network": "classifier", "config": spec.plain(), "made_from": made_from}
    checkpoint.save(path, network.state_dict(), metadata)


def as_classifier(network: nn.Module, spec: ClassifierSpec, source: str, digest: str = "") -> Classifier:
    """A network that `spec` built, with the preprocessing that it is trained with."""

    def preprocess(images: Tensor) -> Tensor:
        pixels = to_float(images)
        if pixels.shape[2:] == spec.size:
            return pixels
        return F.interpolate(pixels, spec.size, mode="bilinear", antialias=True, align_corners=False)

    return Classifier(network.eval(), preprocess, spec.classes, source, digest)


def _from_file(path: Path, device: torch.device) -> Classifier:
    if path.suffix != ".safetensors":
        raise UserError(f"--classifier {path}: only weights in safetensors are read; give {_OWN}")
    tensors, metadata = checkpoint.load(path)
    if metadata.get("network") != "classifier":
        raise UserError(
            f"{path}: weights of another kind ({metadata.get('network')}), not of a classifier; give {_OWN}"
        )
    spec = ClassifierSpec.parse(metadata.get("config"), str(path))
    network = checkpoint.build_module(spec.build, tensors, path)
    return as_classifier(network.to(device).requires_grad_(False), spec, str(path), files.digest(path))


def _from_torchvision(name: str, device: torch.device) -> Classifier:
    # Reads the file as tensors only. get_model would unpickle anything, but then finds the verified file in the cache.
    weights = torchvision_weights(name, label=f"--classifier {name}", alternative=f"give {_OWN}")
    network = torchvision.models.get_model(name, weights=weights.entry, progress=False)
    network = network.to(device).eval().requires_grad_(False)
    categories = tuple(weights.entry.meta["categories"])
    return Classifier(network, weights.entry.transforms(), categories, name, files.digest(weights.path), by_place=True)


class LabelledSamples(Dataset[ImageSample]):
    """The images of a folder that `vqvae2 sample` wrote, as RGB, each with the label it was sampled for.

    Raises UserError where the folder has no manifest, no labels, or not all of its images.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = files.read_json(folder / "manifest.json")
        if not self.manifest.get("labels"):
            raise UserError(f"{folder}: samples without labels; this needs a run trained with `data.labels: folder`")
        self.labels: list[int] = self.manifest["labels"]
        self.classes: tuple[str, ...] = tuple(self.manifest["class_names"])
        height, width = self.manifest["image_size"]
        self.size: tuple[int, int] = (height, width)
        missing = [number for number in range(len(self.labels)) if not self.path(number).is_file()]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(self.labels)} images are missing, "
                f"{self.path(missing[0]).name} the first; run the `vqvae2 sample` command that made it again"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> ImageSample:
        return ImageSample(hwc_to_chw(read_image(self.path(number), self.size)), self.labels[number])

    def path(self, number: int) -> Path:
        """The PNG of an image."""
        return self.folder / "images" / f"{number:06d}.png"

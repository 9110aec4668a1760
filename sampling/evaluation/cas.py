"""Classification accuracy score: a ResNet learns from samples alone and is tested on real, held-out images.

Ravuri, Vinyals 2019 (arXiv 1905.10887), as in Razavi, van den Oord, Vinyals 2019 (VQ-VAE-2). Samples that miss a part
of their class, or look like another, teach it worse than real images would, whatever they do for FID.
"""

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from sampling.evaluation.classifier import (
    SMALL,
    Architecture,
    Classifier,
    ClassifierSpec,
    LabelledSamples,
    load_classifier,
    save_classifier,
)
from vqvae2 import checkpoint, files
from vqvae2.config import Config
from vqvae2.data.images import DataConfig, ImageDataset, ImageSample, open_datasets, to_float, to_rgb
from vqvae2.data.samplers import MapDataset, ResumableBatchSampler, SequentialBatchSampler, load_batches
from vqvae2.errors import UserError
from vqvae2.run_folder import RunFolder

_COMPARABLE = 500  # samples of each class; the field's data sets have 1,300 (ImageNet) and 5,000 (CIFAR-10)


class CasConfig(Config):
    """How the classifier is trained."""

    model: Architecture | None = Field(default=None, description="resnet18 up to 64 px, else resnet50")
    steps: int = Field(default=2000, ge=1)
    batch_size: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    seed: int = Field(default=0, ge=0)
    real: bool = Field(default=False, description="train one on equally many real images, too")

    def spec(self, classes: tuple[str, ...], size: tuple[int, int]) -> ClassifierSpec:
        """What the classifier is built from."""
        architecture = self.model or ("resnet18" if max(size) <= SMALL else "resnet50")
        return ClassifierSpec(architecture=architecture, classes=classes, size=size)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options `--cas` and `--cas-…` of a command."""
    group = parser.add_argument_group("classification accuracy score")
    group.add_argument("--cas", action="store_true", help="train a ResNet on the samples, test it on held-out images")
    group.add_argument("--cas-real", action="store_true", help="train another on as many real images, to compare")
    group.add_argument("--cas-model", help="resnet18 to resnet152; resnet18 up to 64 px, else resnet50")
    group.add_argument("--cas-steps", type=int, help="training steps")
    group.add_argument("--cas-batch-size", type=int, help="images in a training step")
    group.add_argument("--cas-seed", type=int, help="of weights, order and augmentation")


def take_options(given: dict[str, Any]) -> CasConfig | None:
    """The settings in parsed options, which are removed from `given`; None without `--cas`."""
    wanted = given.pop("cas", False)
    settings = {name: given.pop(name) for name in list(given) if name.startswith("cas_")}
    settings = {name.removeprefix("cas_"): value for name, value in settings.items() if value is not False}
    if settings and not wanted:
        raise UserError(f"--cas-{next(iter(settings)).replace('_', '-')}: works with --cas alone; add it")
    return CasConfig.parse(settings, "--cas") if wanted else None


class Augmented(Dataset[ImageSample]):
    """Images for training: `images[i, draw]` is item i, mirrored half of the time, and moved by up to an eighth."""

    def __init__(self, images: MapDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> ImageSample:
        index, draw = key
        image, label = self.images[index]
        pixels = image.numpy()
        rng = np.random.default_rng(draw)
        height, width = pixels.shape[1:]
        margins = (height // 8, width // 8)
        top, left = (int(rng.integers(2 * margin + 1)) for margin in margins)
        pixels = np.pad(pixels, ((0, 0), *((margin, margin) for margin in margins)), mode="reflect")
        pixels = pixels[:, top : top + height, left : left + width]
        if rng.random() < 0.5:
            pixels = pixels[:, :, ::-1]
        return ImageSample(torch.from_numpy(pixels.copy()), label)


@torch.random.fork_rng(devices=[])
def train(
    images: MapDataset,
    spec: ClassifierSpec,
    config: CasConfig,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> nn.Module:
    """A network trained from nothing: AdamW, cosine schedule, mirrored and moved images. The seed decides it (CPU)."""
    torch.manual_seed(config.seed)
    network = spec.build().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    order = ResumableBatchSampler(len(images), config.batch_size, start=0, stop=config.steps, seed=config.seed)
    kind = torch.device(device).type
    with tqdm(
        load_batches(Augmented(images), order, num_workers), "training classifier", config.steps, unit="step"
    ) as batches:
        for pixels, labels in batches:
            with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                loss = F.cross_entropy(network(to_float(to_rgb(pixels).to(device))), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if batches.n % 20 == 0:
                batches.set_postfix(loss=f"{loss.item():.3f}")
    return network.eval()


def accuracy(classifier: Classifier, images: MapDataset, batch_size: int, num_workers: int = 0) -> dict[str, float]:
    """Share of images whose label is the likeliest class, `top1`, and among the five likeliest, `top5`.

    There is no `top5` with five classes or fewer, where it says nothing.
    """
    depths = {"top1": 1} | ({"top5": 5} if len(classifier.classes) > 5 else {})
    right = dict.fromkeys(depths, 0)
    for pixels, labels in _in_order(images, batch_size, num_workers):
        best = classifier.log_probabilities(to_rgb(pixels)).topk(max(depths.values()), dim=1).indices.cpu()
        for name, depth in depths.items():
            right[name] += int((best[:, :depth] == labels[:, None]).sum())
    return {name: count / len(images) for name, count in right.items()}


def _in_order(images: MapDataset, batch_size: int, num_workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = SequentialBatchSampler(len(images), batch_size)
    yield from tqdm(load_batches(images, order, num_workers), "testing classifier", len(order), leave=False)


@dataclass(frozen=True)
class Part(Dataset[ImageSample]):
    """Some items of a data set."""

    whole: ImageDataset
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> ImageSample:
        return self.whole[self.indices[index]]


@dataclass(frozen=True)
class Experiment:
    """Everything that the score of one folder of samples needs."""

    samples: LabelledSamples
    training: ImageDataset
    held_out: ImageDataset
    folder: Path  # where classifiers are kept
    config: CasConfig

    @classmethod
    def open(cls, folder: RunFolder, samples: Path, config: CasConfig) -> "Experiment":
        """Raises UserError where the samples or the run have no labels, or not the same ones."""
        found = LabelledSamples(samples)
        training, held_out = open_datasets(DataConfig.load(folder.config, "data"), folder.data_index)
        if found.classes != held_out.classes:
            raise UserError(
                f"--cas: the {len(found.classes)} classes of {samples} are not the {len(held_out.classes)} of the "
                "run's images (data.path, data.labels); sample again, or mend the folder of images"
            )
        return cls(found, training, held_out, folder.evaluation, config)

    def measure(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The score, as it stands in metrics.json; a classifier that is trained already is not trained again."""
        made_from = {"samples": files.digest(self.samples.folder / "manifest.json")}
        result = self._score("classifier-samples", self.samples, made_from, device)
        per_class = len(self.samples) // len(self.samples.classes)
        if per_class < _COMPARABLE:
            result["warning"] = f"too few samples for a comparable score: {len(self.samples)} ({per_class} a class)"
        if self.config.real:
            part = self._real()
            names = hashlib.sha256("\0".join(self.training.names[index] for index in part.indices).encode())
            result["real"] = self._score("classifier-real", part, {"images": names.hexdigest()}, device)
        return result

    def _real(self) -> Part:
        """As many training images as there are samples, or all."""
        order = np.random.default_rng(self.config.seed).permutation(len(self.training))[: len(self.samples)]
        return Part(self.training, tuple(sorted(order.tolist())))

    def _score(
        self, name: str, images: MapDataset, made_from: dict[str, str], device: torch.device | str
    ) -> dict[str, Any]:
        path = self.folder / f"{name}.safetensors"
        config, num_workers = self.config, self.held_out.config.num_workers
        spec = config.spec(self.samples.classes, self.samples.size)
        settings = {**config.plain(), "model": spec.architecture}
        del settings["real"]
        recipe = {**made_from, "settings": settings}
        if not path.is_file() or checkpoint.read_metadata(path).get("made_from") != recipe:
            save_classifier(path, train(images, spec, config, device, num_workers), spec, recipe)
        found = accuracy(load_classifier(str(path), device), self.held_out, config.batch_size, num_workers)
        counts = {"trained_on": len(images), "tested_on": len(self.held_out)}
        return {**found, **counts, "classifier": path.name, **settings}


def kept(metrics: Path, samples_digest: str | None) -> dict[str, Any]:
    """The score that metrics.json holds already, where it is of these samples."""
    before = files.read_json(metrics) if metrics.is_file() else {}
    same = samples_digest and before.get("made_from", {}).get("samples") == samples_digest
    return {"cas": before["cas"]} if same and "cas" in before else {}


def describe(result: dict[str, Any]) -> list[str]:
    """The score as lines of a table."""
    lines = []
    for name, found in (("CAS", result), ("CAS, real images", result.get("real"))):
        if found:
            shown = ", ".join(f"top-{key[3:]} {found[key]:.1%}" for key in ("top1", "top5") if key in found)
            note = f"; {found['warning']}" if "warning" in found else ""
            source = "samples" if found is result else "real images"
            lines.append(
                f"{name:<16} {shown} of {found['tested_on']} held-out images ({found['model']} trained on "
                f"{found['trained_on']} {source}{note})"
            )
    return lines

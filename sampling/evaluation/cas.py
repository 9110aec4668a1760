"""Classification accuracy score: train a ResNet on samples only, and test it on real held-out images.

Source: Ravuri and Vinyals 2019 (arXiv 1905.10887), used by Razavi, van den Oord and Vinyals 2019 (VQ-VAE-2). The score
is low if the samples of a class lack diversity or resemble other classes, including cases that FID does not detect.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from sampling.evaluation.classifier import (
    Classifier,
    ClassifierConfig,
    LabeledSamples,
    load_classifier,
    save_classifier,
)
from sampling.evaluation.evaluation_config import CasConfig
from sampling.evaluation.metrics import read_metrics
from sampling.output_folder import manifest_path
from sampling.run_config import RunConfig
from sampling.run_data import open_run_datasets
from vqvae2 import checkpoint, files
from vqvae2.data.images import ImageDataset, ImageSample, to_float, to_rgb
from vqvae2.data.samplers import MapDataset, ResumableBatchSampler, SequentialBatchSampler, load_batches
from vqvae2.errors import UserError
from vqvae2.run_folder import RunFolder

# Samples per class below which a warning is added. Published scores use 1,300 (ImageNet) or 5,000 (CIFAR-10).
_MIN_COMPARABLE_PER_CLASS = 500


class AugmentedDataset(Dataset[ImageSample]):
    """Training images with augmentation: `dataset[i, draw]` is image i, randomly flipped and shifted.

    Images are flipped horizontally with probability 0.5 and shifted by up to an eighth of their size, with reflection
    padding. The augmentation depends on the integer `draw` only.
    """

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
def train_classifier(
    images: MapDataset,
    model: ClassifierConfig,
    config: CasConfig,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> nn.Module:
    """Train a classifier from random initialization and return it in evaluation mode.

    The recipe is AdamW with a cosine schedule and the augmentation of `AugmentedDataset`. On the CPU the result is
    determined by `config.seed`. The global random state is restored.
    """
    torch.manual_seed(config.seed)
    network = model.build().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    sampler = ResumableBatchSampler(len(images), config.batch_size, start=0, stop=config.steps, seed=config.seed)
    batches = load_batches(AugmentedDataset(images), sampler, num_workers)
    kind = torch.device(device).type
    with tqdm(batches, "training classifier", config.steps, unit="step") as progress:
        for pixels, labels in progress:
            with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                loss = F.cross_entropy(network(to_float(to_rgb(pixels).to(device))), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if progress.n % 20 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}")
    return network.eval()


def top_k_accuracy(
    classifier: Classifier, images: MapDataset, batch_size: int, num_workers: int = 0
) -> dict[str, float]:
    """Return the `top1` and `top5` accuracies in [0, 1]; `top5` is omitted for five classes or fewer."""
    top_k = {"top1": 1} | ({"top5": 5} if len(classifier.classes) > 5 else {})
    correct = dict.fromkeys(top_k, 0)
    sampler = SequentialBatchSampler(len(images), batch_size)
    batches = load_batches(images, sampler, num_workers)
    for pixels, labels in tqdm(batches, "testing classifier", len(sampler), leave=False):
        predicted = classifier.log_probs(to_rgb(pixels)).topk(max(top_k.values()), dim=1).indices.cpu()
        for name, k in top_k.items():
            correct[name] += int((predicted[:, :k] == labels[:, None]).sum())
    return {name: count / len(images) for name, count in correct.items()}


@dataclass(frozen=True)
class ClassificationAccuracyScore:
    """The score of one folder of samples: its data, its settings, and the folder that stores trained classifiers."""

    samples: LabeledSamples
    training: ImageDataset
    held_out: ImageDataset
    folder: Path  # where classifiers are stored
    config: CasConfig

    @classmethod
    def open(cls, folder: RunFolder, samples: Path, config: CasConfig) -> "ClassificationAccuracyScore":
        """Open the samples and the images of a run.

        Raises:
            UserError: If the samples have no labels, or their classes differ from those of the run's images.
        """
        labeled = LabeledSamples(samples)
        training, held_out = open_run_datasets(RunConfig.from_resolved_yaml(folder.config).data, folder)
        if labeled.classes != held_out.classes:
            raise UserError(
                f"cas: the {len(labeled.classes)} classes of {samples} do not match the {len(held_out.classes)} "
                "classes of the run's images (data.path, data.labels). Sample again, or restore the images."
            )
        return cls(labeled, training, held_out, folder.evaluation, config)

    def measure(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Return the score in the format of metrics.json; classifiers that are already trained are reused.

        A classifier that is trained on real images is also tested on the samples: `recognized` is the share that it
        assigns to the class they were sampled for.
        """
        made_from = {"samples": files.digest(manifest_path(self.samples.folder))}
        result = self._score("classifier-samples", self.samples, made_from, device)
        per_class = len(self.samples) // len(self.samples.classes)
        if per_class < _MIN_COMPARABLE_PER_CLASS:
            result["warning"] = f"too few samples for a comparable score: {len(self.samples)} ({per_class} per class)"
        if self.config.real:
            subset = self._real_images()
            names = hashlib.sha256("\0".join(self.training.names[index] for index in subset.indices).encode())
            real = self._score("classifier-real", subset, {"images": names.hexdigest()}, device)
            classifier = load_classifier(str(self.folder / real["classifier"]), device)
            real["recognized"] = top_k_accuracy(classifier, self.samples, self.config.batch_size)["top1"]
            result["real"] = real
        return result

    def _real_images(self) -> Subset[ImageSample]:
        """Return as many random training images as there are samples, or all if there are fewer."""
        order = np.random.default_rng(self.config.seed).permutation(len(self.training))[: len(self.samples)]
        return Subset(self.training, sorted(order.tolist()))

    def _score(
        self, name: str, images: MapDataset, made_from: dict[str, str], device: torch.device | str
    ) -> dict[str, Any]:
        path = self.folder / f"{name}.safetensors"
        config, num_workers = self.config, self.held_out.config.num_workers
        model = config.classifier(self.samples.classes, self.samples.size)
        settings = {**config.to_dict(), "model": model.architecture}
        del settings["real"], settings["enabled"]
        recipe = {**made_from, "settings": settings}
        if not path.is_file() or checkpoint.read_metadata(path).get("made_from") != recipe:
            save_classifier(path, train_classifier(images, model, config, device, num_workers), model, recipe)
        accuracies = top_k_accuracy(load_classifier(str(path), device), self.held_out, config.batch_size, num_workers)
        counts = {"trained_on": len(images), "tested_on": len(self.held_out)}
        return {**accuracies, **counts, "classifier": path.name, **settings}


def previous_score(metrics: Path, samples_digest: str | None) -> dict[str, Any]:
    """Return `{"cas": score}` from an earlier metrics.json if it was measured on the same samples, else `{}`."""
    previous = read_metrics(metrics) or {"made_from": {"samples": None}}
    same = samples_digest and previous["made_from"]["samples"] == samples_digest
    return {"cas": previous["cas"]} if same and previous.get("cas") else {}

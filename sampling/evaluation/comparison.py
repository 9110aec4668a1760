"""Compare samples with a reference, and reconstructions with their originals, in the features of one network."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampling.evaluation.features import (
    FeatureSummary,
    KeepOptions,
    find_differences,
    is_statistics_file,
    summarize_features,
    summarize_features_cached,
)
from sampling.evaluation.fid import MIN_COMPARABLE_IMAGES
from sampling.evaluation.image_sets import ImageBatch, ImageFolder, open_image_set
from sampling.evaluation.metrics import attempt
from vqvae2 import distributed
from vqvae2.data.images import ImageDataset, to_float, to_rgb, to_uint8
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.errors import UserError
from vqvae2.metrics.feature_extractor import FeatureExtractor
from vqvae2.metrics.inception import InceptionFeatures
from vqvae2.metrics.kid import kernel_inception_distance
from vqvae2.metrics.precision_recall import precision_recall
from vqvae2.metrics.pretrained_features import INCEPTION
from vqvae2.models import Autoencoder

_MAX_FEATURES = 10_000
_INCEPTION_SCORE_SPLITS = 10


@dataclass(frozen=True)
class ComparedImages:
    """The images that an evaluation compares."""

    samples: ImageFolder
    reference: str  # `validation`, a folder, or a file of Inception statistics
    held_out: ImageDataset
    autoencoder: Autoencoder  # whose reconstructions of held-out images are measured
    batch_size: int
    cache: Path  # folder for the features of a reference folder


@dataclass(frozen=True)
class Reference:
    """Features of the images that samples are compared with."""

    name: str
    features: FeatureSummary
    formats: dict[str, int]  # number of images by file format; empty for precomputed statistics
    is_validation: bool = False

    def protocol(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "split": "validation" if self.is_validation else None,
            "count": self.features.statistics.count,
            "size": self.features.image_size,
            "formats": self.formats,
        }


@dataclass(frozen=True)
class Comparison:
    """Features of all images by one network."""

    network: str
    samples: FeatureSummary
    formats: dict[str, int]  # number of samples by file format
    reference: Reference
    held_out: FeatureSummary
    reconstructions: FeatureSummary

    def distance(self) -> dict[str, Any]:
        """Return the Fréchet distance of the samples from the reference, or why it is missing."""
        counts = {"samples": self.samples.statistics.count, "reference": self.reference.features.statistics.count}
        return attempt(lambda: self._distance(self.samples, self.reference.features, counts))

    def reconstruction_distance(self) -> dict[str, Any]:
        """Return the Fréchet distance of the reconstructions from the held-out images, or why it is missing."""
        counts = {"images": self.held_out.statistics.count}
        return attempt(lambda: self._distance(self.reconstructions, self.held_out, counts))

    def kernel_distance(self) -> dict[str, Any]:
        """Return the kernel distance (KID) of the samples from the reference, or why it is missing."""
        return attempt(lambda: _kernel_distance(*self._features()))

    def precision_recall(self) -> dict[str, Any]:
        """Return precision, recall, density and coverage of the samples, or why they are missing."""
        return attempt(lambda: vars(precision_recall(*self._features())))

    def inception_score(self) -> dict[str, Any]:
        """Return the Inception score of the samples, or why it is missing."""
        score = self.samples.inception_score
        return score._asdict() if score else {"missing": "needs the logits of the Inception network"}

    def warnings(self) -> list[str]:
        """Return the differences between samples and reference that bias the metrics."""
        sizes = (self.samples.image_size, self.reference.features.image_size)
        return find_differences(("samples are", "the reference is"), sizes, (self.formats, self.reference.formats))

    def _distance(self, first: FeatureSummary, second: FeatureSummary, counts: dict[str, int | None]) -> dict[str, Any]:
        value = first.statistics.distance(second.statistics)
        known = {name: count for name, count in counts.items() if count is not None}
        comparable = not known or min(known.values()) >= MIN_COMPARABLE_IMAGES
        sizes = ", ".join(f"{count} {name}" for name, count in known.items())
        term = "FID" if self.network == INCEPTION else "FD"
        text = f"{value:.2f} ({sizes}{'' if comparable else f'; too few images for a comparable {term}'})"
        return {"value": value, "text": text, "comparable": comparable}

    def _features(self) -> tuple[Tensor, Tensor]:
        samples, reference = self.samples.features, self.reference.features.features
        if samples is None or reference is None:
            raise UserError("the reference has statistics only, and no features of single images")
        return samples, reference


def compare(images: ComparedImages, extractor: FeatureExtractor) -> Comparison:
    """Measure the features of all images."""
    generated, held_out = images.samples, images.held_out
    features = summarize_features(
        generated.batches(images.batch_size),
        len(generated),
        extractor,
        _keep(len(generated), extractor),
        "features of samples",
    )
    reference = _measure_reference(images, extractor)
    originals = reference.features
    if not reference.is_validation:
        originals = measure_held_out(held_out, images.batch_size, extractor)
    reconstructions = measure_held_out(held_out, images.batch_size, extractor, images.autoencoder)
    return Comparison(extractor.name, features, generated.formats, reference, originals, reconstructions)


def _measure_reference(images: ComparedImages, extractor: FeatureExtractor) -> Reference:
    path, name, held_out = Path(images.reference), images.reference, images.held_out
    if name == "validation":
        features = measure_held_out(held_out, images.batch_size, extractor)
        # The transform's output is measured directly, without a lossy file in between.
        return Reference(name, features, {"png": len(held_out)}, is_validation=True)
    if is_statistics_file(path):
        if not isinstance(extractor, InceptionFeatures):
            raise UserError(f"{path}: statistics of Inception features. Use a folder of images for {extractor.name}.")
        return Reference(name, FeatureSummary.load(path), {})
    found = open_image_set(path)
    keep, num_workers = _keep(len(found), extractor), held_out.config.num_workers
    features = summarize_features_cached(found, extractor, images.cache, keep, images.batch_size, num_workers)
    return Reference(name, features, found.formats)


def measure_held_out(
    images: ImageDataset, batch_size: int, extractor: FeatureExtractor, autoencoder: Autoencoder | None = None
) -> FeatureSummary:
    """Return the features of held-out images, or of their reconstructions if an autoencoder is given."""
    label = "features of reconstructions" if autoencoder else "features of held-out images"
    batches = _held_out_batches(images, batch_size, autoencoder)
    return summarize_features(batches, len(images), extractor, _keep(len(images), extractor), label)


@torch.inference_mode()
def _held_out_batches(images: ImageDataset, batch_size: int, autoencoder: Autoencoder | None) -> Iterator[ImageBatch]:
    order = SequentialBatchSampler(len(images), batch_size, distributed.get_rank(), distributed.get_world_size())
    for indices, (pixels, _) in zip(order, load_batches(images, order, images.config.num_workers), strict=True):
        if autoencoder:
            device = next(autoencoder.parameters()).device
            pixels = to_uint8(autoencoder.reconstruct(to_float(pixels.to(device))))
        yield ImageBatch(torch.tensor(indices), to_rgb(pixels))


def _keep(count: int, extractor: FeatureExtractor) -> KeepOptions:
    has_score = isinstance(extractor, InceptionFeatures)
    return KeepOptions(_MAX_FEATURES, min(_INCEPTION_SCORE_SPLITS, count) if has_score else 0)


def _kernel_distance(generated: Tensor, reference: Tensor) -> dict[str, float]:
    distance = kernel_inception_distance(generated, reference)
    return {"mean": distance.mean, "std": distance.std}

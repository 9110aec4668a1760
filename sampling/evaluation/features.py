"""Features of image sets by a network: Gaussian statistics, retained features and the Inception score in one pass.

Each process passes its share of the images to `summarize_features`; all of them return the same summary:

    folder = ImageFolder(Path("runs/ffhq256/samples/images"))
    summary = summarize_features(folder.batches(50), len(folder), extractor)
    summary.statistics.distance(reference.statistics)

Memory does not grow with the number of images, except for the features that `KeepOptions` retains.
"""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from tqdm import tqdm

from sampling.evaluation.image_sets import ImageBatch, ImageSet
from vqvae2 import distributed
from vqvae2.errors import UserError
from vqvae2.metrics.feature_extractor import FeatureExtractor
from vqvae2.metrics.frechet import GaussianStatistics, load_npz, save_npz
from vqvae2.metrics.inception import NUM_CLASSES
from vqvae2.metrics.inception_score import InceptionScore, InceptionScoreResult


@dataclass(frozen=True)
class KeepOptions:
    """What to compute and retain in addition to the Gaussian statistics; nothing by default.

    `features` is the maximum number of feature vectors to retain (for KID, precision and recall), a random subset
    determined by `seed`. `splits` is the number of splits of the Inception score, which other networks lack. With 0
    splits the score is not computed, and below 2048 dimensions the last layers of the network are skipped.
    """

    features: int = 0
    splits: int = 0
    seed: int = 2020


@dataclass(frozen=True)
class FeatureSummary:
    """The result of one pass over a set of images, identical on every process."""

    statistics: GaussianStatistics
    features: Float32[Tensor, "k d"] | None = None  # on the CPU, in image order
    inception_score: InceptionScoreResult | None = None
    image_size: tuple[int, int] | None = None  # (height, width) in pixels

    def save(self, path: Path) -> None:
        """Write the summary atomically to an .npz that pytorch-fid can read as statistics."""
        arrays: dict[str, Any] = self.statistics.to_arrays()
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        if self.inception_score is not None:
            arrays["score"] = np.array(self.inception_score)
        if self.image_size is not None:
            arrays["size"] = np.array(self.image_size)
        save_npz(path, arrays)

    @classmethod
    def load(cls, path: Path) -> "FeatureSummary":
        """Load a file written by `save`, or any .npz with arrays `mu` and `sigma`.

        Raises:
            UserError: If the file is missing or damaged, or its arrays have other shapes or types.
        """
        arrays = load_npz(path, ("mu", "sigma", "n", "features", "score", "size"))
        statistics = GaussianStatistics.from_arrays(arrays, path)
        features, score, size = (arrays.get(key) for key in ("features", "score", "size"))
        if features is not None and (features.dtype != np.float32 or features.shape[1:] != (statistics.dims,)):
            raise UserError(
                f"{path}: `features` is {features.dtype} {features.shape}; expected float32 (K, {statistics.dims}). "
                "Delete the file to compute it again."
            )
        if features is not None and not np.isfinite(features).all():
            raise UserError(f"{path}: `features` contains NaN or infinity. Delete the file to compute it again.")
        if score is not None and (score.shape != (2,) or score.dtype != np.float64 or not np.isfinite(score).all()):
            raise UserError(f"{path}: `score` is not a pair of numbers. Delete the file to compute it again.")
        if size is not None and (size.shape != (2,) or size.dtype.kind != "i" or size.min() < 1):
            raise UserError(f"{path}: `size` is not a pair of sizes. Delete the file to compute it again.")
        return cls(
            statistics,
            None if features is None else torch.from_numpy(features),
            None if score is None else InceptionScoreResult(*score.tolist()),
            None if size is None else tuple(size.tolist()),
        )


def find_differences(
    subjects: tuple[str, str],
    sizes: tuple[tuple[int, int] | None, tuple[int, int] | None],
    formats: tuple[Collection[str], Collection[str]],
) -> list[str]:
    """Return warnings of the differences between two sets of images that bias distances.

    Args:
        subjects: How the warnings name the sets, with a verb: `samples are`.
        sizes: (height, width) in pixels, or None if unknown.
        formats: File formats; empty if unknown.
    """
    warnings = []
    if all(sizes) and sizes[0] != sizes[1]:
        ours, theirs = ("×".join(map(str, size or ())) for size in sizes)
        warnings.append(
            f"{subjects[0]} {ours} pixels and {subjects[1]} {theirs}; resize the images of one to the size of the other"
        )
    known = [set(names) - {"npz"} for names in formats]  # which does not tell how its images were stored before
    if all(known) and known[0] != known[1]:
        ours, theirs = ("/".join(sorted(names)) for names in known)
        warnings.append(f"{subjects[0]} {ours} and {subjects[1]} {theirs}; lossy compression changes the distances")
    return warnings


def is_statistics_file(path: Path) -> bool:
    """Return whether `path` is an .npz that contains `mu` or `sigma`.

    Raises:
        UserError: If `path` ends in .npz and is missing or damaged.
    """
    return path.suffix == ".npz" and not path.is_dir() and bool(load_npz(path, ("mu", "sigma")))


def summarize_features(
    batches: Iterable[ImageBatch],
    count: int,
    extractor: FeatureExtractor,
    keep: KeepOptions | None = None,
    progress: str | None = None,
) -> FeatureSummary:
    """Extract features from a set of `count` images and return their summary.

    This is a collective operation: every process calls it, with `batches` yielding its share of the images. Apart from
    rounding, the result depends neither on the number of processes nor on the batch size. `progress` is the label of
    the progress bar, which is only shown on a terminal.

    Raises:
        UserError: If the number of images differs from `count`, or their sizes differ between processes.
    """
    keep = keep or KeepOptions()
    device = extractor.device
    statistics = GaussianStatistics(extractor.dims, device)
    score = InceptionScore(count, keep.splits, keep.seed, NUM_CLASSES, device) if keep.splits else None
    row_of = _retained_rows(count, keep)
    # Every process fills in only its own rows, so the sum over processes is the full table.
    retained = torch.zeros(int((row_of >= 0).sum()), extractor.dims, device=device)
    size = torch.zeros(2, dtype=torch.int64, device=device)
    disable = None if progress and distributed.get_rank() == 0 else True
    with tqdm(total=count, desc=progress or "", unit="image", disable=disable, leave=False) as bar:
        for indices, images in batches:
            output = extractor(images, logits=score is not None)
            statistics.update(output.features)
            if score is not None and output.logits is not None:
                score.update(output.logits, indices)
            rows = row_of[indices]
            retained[rows[rows >= 0].to(device)] = output.features[(rows >= 0).to(device)]
            size = torch.tensor(images.shape[2:], device=device)
            bar.update(len(images) * distributed.get_world_size())
    statistics.all_reduce()
    if statistics.count != count:
        raise UserError(f"expected {count} images, but received {statistics.count}")
    if score is not None:
        score.all_reduce()
    return FeatureSummary(
        statistics,
        distributed.all_reduce_sum(retained).cpu() if keep.features else None,
        score.compute() if score is not None else None,
        _common_size(size),
    )


def summarize_features_cached(
    images: ImageSet,
    extractor: FeatureExtractor,
    cache: Path,
    keep: KeepOptions | None = None,
    batch_size: int = 50,
    num_workers: int = 0,
) -> FeatureSummary:
    """Return the summary of an image set from the folder `cache`, or compute it and store it there.

    The cache key is a digest of the images, the network's weights, the feature dimension and `keep`. A damaged cache
    file is recomputed.
    """
    keep = keep or KeepOptions()
    key = f"{images.digest()} {extractor.weights_digest} {extractor.dims} {keep}"
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    cached = _load_if_valid(path, len(images), keep)
    # Computing is a collective operation: if the cache is missing on one machine, all processes have to compute.
    hits = distributed.all_reduce_sum(torch.tensor(int(cached is not None), device=extractor.device))
    if cached is not None and int(hits) == distributed.get_world_size():
        return cached
    summary = summarize_features(
        images.batches(batch_size, num_workers), len(images), extractor, keep, images.path.name
    )
    if distributed.get_rank() == 0 and len(images) > 1:  # one image has no covariance to store
        summary.save(path)
    return summary


def _load_if_valid(path: Path, count: int, keep: KeepOptions) -> FeatureSummary | None:
    """Return a cached summary of `count` images, or None if there is none or it is damaged."""
    try:
        summary = FeatureSummary.load(path) if path.is_file() else None
    except UserError:
        return None
    if summary is None or summary.statistics.count != count:
        return None
    retained = 0 if summary.features is None else len(summary.features)
    return summary if retained == min(count, keep.features) else None


def _retained_rows(count: int, keep: KeepOptions) -> Tensor:
    """Return each image's row in the table of retained features, int64 (count,), or −1 if it is not retained."""
    retained = np.sort(np.random.RandomState(keep.seed).permutation(count)[: keep.features])
    rows = np.full(count, -1)
    rows[retained] = np.arange(len(retained))
    return torch.from_numpy(rows)


def _common_size(size: Tensor) -> tuple[int, int] | None:
    """Return the (height, width) that all processes agree on; a process that saw no image passes zeros.

    Raises:
        UserError: If the sizes differ between processes.
    """
    seen = distributed.all_reduce_sum((size > 0).long())[0].clamp(min=1)
    total = distributed.all_reduce_sum(size.clone())
    if (size > 0).all() and (total != size * seen).any():
        raise UserError(
            f"image sizes differ: some images are {size[0]}×{size[1]} pixels (height × width), others are not. "
            "Resize all images of the set to one size."
        )
    height, width = (total // seen).tolist()
    return (height, width) if height else None

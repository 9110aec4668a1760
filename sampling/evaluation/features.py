"""Sets of images → Inception features, and what evaluation keeps of them: one pass, in memory free of their number.

A source yields batches of this process's share of its images; `summarize` consumes them on every process alike:

    folder = ImageFolder(Path("runs/ffhq256/samples/images"))
    summary = summarize(folder.batches(50), len(folder), extractor)
    summary.statistics.distance(reference.statistics)
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor
from tqdm import tqdm

from sampling.evaluation.image_sets import Batch, ImageFolder, Images
from vqvae2 import distributed
from vqvae2.errors import UserError
from vqvae2.metrics.frechet import GaussianStatistics, load_npz, save_npz
from vqvae2.metrics.inception import NUM_CLASSES, FeatureExtractor
from vqvae2.metrics.inception_score import InceptionScore, InceptionScoreResult


@dataclass(frozen=True)
class KeepOptions:
    """What to keep beside the Gaussian statistics. The defaults keep nothing more.

    `features`: how many feature vectors at most (KID, precision and recall), drawn by `seed`. `splits`: of the
    Inception score; 0 leaves it, and the last layers of the network below 2048 dimensions, out.
    """

    features: int = 0
    splits: int = 0
    seed: int = 2020


@dataclass(frozen=True)
class FeatureSummary:
    """What one pass over a set of images leaves, equal on every process."""

    statistics: GaussianStatistics
    features: Float32[Tensor, "k d"] | None = None  # on the CPU, in the order of the images
    score: InceptionScoreResult | None = None
    size: tuple[int, int] | None = None  # (height, width) in pixels

    def save(self, path: Path) -> None:
        """Write an .npz, complete or not at all, that pytorch-fid reads as statistics."""
        arrays: dict[str, Any] = self.statistics.to_arrays()
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        if self.score is not None:
            arrays["score"] = np.array(self.score)
        if self.size is not None:
            arrays["size"] = np.array(self.size)
        save_npz(path, arrays)

    @classmethod
    def load(cls, path: Path) -> "FeatureSummary":
        """Read what `save` wrote, or an .npz of `mu` and `sigma` alone; UserError where it holds anything else."""
        arrays = load_npz(path, ("mu", "sigma", "n", "features", "score", "size"))
        statistics = GaussianStatistics.from_arrays(arrays, path)
        features, score, size = (arrays.get(key) for key in ("features", "score", "size"))
        if features is not None and (features.dtype != np.float32 or features.shape[1:] != (statistics.dims,)):
            raise UserError(f"{path}: `features` {features.dtype} {features.shape}; expected (K, {statistics.dims})")
        if any(pair is not None and pair.shape != (2,) for pair in (score, size)):
            raise UserError(f"{path}: `score` or `size` is no pair of numbers; make the file again")
        return cls(
            statistics,
            None if features is None else torch.from_numpy(features),
            None if score is None else InceptionScoreResult(*score.tolist()),
            None if size is None else tuple(size.tolist()),
        )


def holds_statistics(path: Path) -> bool:
    """Whether `path` is an .npz with `mu` or `sigma` in it; UserError where an .npz is missing or damaged."""
    return path.suffix == ".npz" and not path.is_dir() and bool(load_npz(path, ("mu", "sigma")))


def summarize(
    batches: Iterable[Batch],
    count: int,
    extractor: FeatureExtractor,
    keep: KeepOptions | None = None,
    progress: str | None = None,
) -> FeatureSummary:
    """One pass over a set of `count` images, of which `batches` are this process's share; every process calls it.

    `progress` labels a bar on standard error, where that is a terminal. The result does not depend on the number of
    processes or the batch size, but for rounding.
    """
    keep = keep or KeepOptions()
    device = extractor.device
    statistics = GaussianStatistics(extractor.dims, device)
    score = InceptionScore(count, keep.splits, keep.seed, NUM_CLASSES, device) if keep.splits else None
    row_of = _rows(count, keep)
    # Every process fills its own rows, so the sum of the tables is the table.
    kept = torch.zeros(int((row_of >= 0).sum()), extractor.dims, device=device)
    size = torch.zeros(2, dtype=torch.int64, device=device)
    label, hidden = progress or "", None if progress and distributed.get_rank() == 0 else True
    with tqdm(total=count, desc=label, unit="image", disable=hidden, leave=False) as bar:
        for indices, images in batches:
            output = extractor(images, logits=score is not None)
            statistics.update(output.features)
            if score is not None and output.logits is not None:
                score.update(output.logits, indices)
            rows = row_of[indices]
            kept[rows[rows >= 0].to(device)] = output.features[(rows >= 0).to(device)]
            size = torch.tensor(images.shape[2:], device=device)
            bar.update(len(images) * distributed.get_world_size())
    statistics.all_reduce()
    if statistics.count != count:
        raise UserError(f"{count} images were announced and {statistics.count} came")
    if score is not None:
        score.all_reduce()
    return FeatureSummary(
        statistics,
        distributed.all_reduce_sum(kept).cpu() if keep.features else None,
        score.compute() if score is not None else None,
        _common_size(size),
    )


def summarize_cached(
    images: Images,
    extractor: FeatureExtractor,
    cache: Path,
    keep: KeepOptions | None = None,
    batch_size: int = 50,
    num_workers: int = 0,
) -> FeatureSummary:
    """`summarize` a folder or array once: the result is kept in the folder `cache` and reused while nothing changes.

    The file is named by a digest of the images, the weights, the dimensions and what is kept. A damaged file is made
    anew.
    """
    keep = keep or KeepOptions()
    key = f"{images.digest()} {extractor.weights_digest} {extractor.dims} {keep}"
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    found = _load_if_sound(path)
    # All processes or none, also where one machine does not see another's cache: the pass is a joint one.
    hits = distributed.all_reduce_sum(torch.tensor(int(found is not None), device=extractor.device))
    if found is not None and int(hits) == distributed.get_world_size():
        return found
    name = images.folder if isinstance(images, ImageFolder) else images.path
    summary = summarize(images.batches(batch_size, num_workers), len(images), extractor, keep, name.name)
    if distributed.get_rank() == 0:
        summary.save(path)
    return summary


def _load_if_sound(path: Path) -> FeatureSummary | None:
    try:
        return FeatureSummary.load(path) if path.is_file() else None
    except UserError:
        return None


def _rows(count: int, keep: KeepOptions) -> Tensor:
    """Row of the table of kept features for each image, −1 for those that are not kept."""
    chosen = np.sort(np.random.RandomState(keep.seed).permutation(count)[: keep.features])
    rows = np.full(count, -1)
    rows[chosen] = np.arange(len(chosen))
    return torch.from_numpy(rows)


def _common_size(size: Tensor) -> tuple[int, int] | None:
    """The size on any process that saw an image; UserError where processes saw different ones."""
    seen = distributed.all_reduce_sum((size > 0).long())[0].clamp(min=1)
    total = distributed.all_reduce_sum(size.clone())
    if (size > 0).all() and (total != size * seen).any():
        raise UserError(f"images of {size[0]}×{size[1]} and of other sizes in one set; all must be of one size")
    height, width = (total // seen).tolist()
    return (height, width) if height else None

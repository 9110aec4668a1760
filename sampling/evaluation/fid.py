"""`vqvae2 fid A B`: the Fréchet Inception distance between two sets, as the pytorch-fid command gives it."""

import argparse
import os
from pathlib import Path

import torch
from accelerate import PartialState

from sampling.evaluation.features import holds_statistics, summarize
from sampling.evaluation.image_sets import open_images
from vqvae2 import distributed
from vqvae2.errors import UserError
from vqvae2.metrics.frechet import GaussianStatistics
from vqvae2.metrics.inception import FEATURE_DIMS, FeatureExtractor, load_inception

COMPARABLE = 2048  # images; with fewer the covariance of 2048 features is singular, and FID grows as N falls


def main(arguments: list[str]) -> None:
    """Print the FID between two folders or .npz files, or save statistics of one; UserError for what cannot work."""
    options = _parser().parse_args(arguments)
    if options.batch_size < 1 or (options.num_workers or 0) < 0:
        raise UserError("--batch-size must be at least 1 and --num-workers at least 0")
    first, second = (Path(path) for path in options.path)
    if options.save_stats:
        _save_statistics(first, second, options)
        return
    # Cheap checks of both sides come before the network is loaded.
    ready = [GaussianStatistics.load(path) if holds_statistics(path) else None for path in (first, second)]
    images = [None if found else open_images(path) for path, found in zip((first, second), ready, strict=True)]
    for path, statistics in zip((first, second), ready, strict=True):
        if statistics and statistics.dims != options.dims:
            raise UserError(f"{path}: statistics of {statistics.dims} dimensions, but --dims {options.dims}")
    extractor = _extractor(options) if any(images) else None
    sides = [
        statistics or _measure(path, extractor, options)
        for path, statistics in zip((first, second), ready, strict=True)
    ]
    distance = sides[0].distance(sides[1])
    if distributed.get_rank() == 0:
        print("FID: ", distance)
        counts = [side.count for side in sides if side.count is not None]
        if counts and min(counts) < COMPARABLE:
            print(f"too few images for a comparable FID: {min(counts)}, fewer than {COMPARABLE}")
        if extractor is not None and not extractor.is_standard:
            print(f"not the standard Inception weights: SHA-256 {extractor.weights_digest}")


def _save_statistics(source: Path, target: Path, options: argparse.Namespace) -> None:
    target = target if target.suffix == ".npz" else target.with_name(f"{target.name}.npz")
    if target.exists():
        raise UserError(f"{target}: exists already; name another file or remove it")
    open_images(source)
    extractor = _extractor(options)
    if distributed.get_rank() == 0:
        print(f"Saving statistics for {source}")
    statistics = _measure(source, extractor, options)
    if distributed.get_rank() == 0:
        statistics.save(target)


def _measure(path: Path, extractor: FeatureExtractor | None, options: argparse.Namespace) -> GaussianStatistics:
    assert extractor is not None
    images = open_images(path)
    workers = min(8, _cpus()) if options.num_workers is None else options.num_workers
    batches = images.batches(options.batch_size, workers)
    return summarize(batches, len(images), extractor, progress=path.name).statistics


def _extractor(options: argparse.Namespace) -> FeatureExtractor:
    name: str = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no device of torch; give cuda, cuda:0 or cpu") from None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device = PartialState(cpu=device.type == "cpu").device or device
    try:
        return load_inception(options.inception_weights, options.dims, device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device}: cannot be used here ({error})") from None


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vqvae2 fid", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("path", nargs=2, help="folder of images, or .npz of statistics (mu, sigma) or images (arr_0)")
    parser.add_argument("--batch-size", type=int, default=50, help="images in one pass of the network")
    parser.add_argument("--num-workers", type=int, help="processes that decode images; by default up to 8")
    parser.add_argument("--device", help="cuda, cuda:0, cpu; by default cuda where there is one")
    parser.add_argument("--dims", type=int, default=2048, choices=FEATURE_DIMS, help="dimensions of the features")
    parser.add_argument("--save-stats", action="store_true", help="write statistics of the first path to the second")
    parser.add_argument("--inception-weights", type=Path, help="file of weights; by default torch's cache or download")
    return parser

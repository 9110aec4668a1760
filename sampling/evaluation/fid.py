"""The command `vqvae2 fid A B`: the Fréchet Inception distance between two image sets, compatible with pytorch-fid."""

import argparse
import os
from pathlib import Path

import torch
from accelerate import PartialState

from sampling.evaluation.features import is_statistics_file, summarize_features
from sampling.evaluation.image_sets import open_image_set
from vqvae2 import distributed
from vqvae2.errors import UserError
from vqvae2.metrics.frechet import GaussianStatistics
from vqvae2.metrics.inception import DIMS, FeatureExtractor, load_inception

# With fewer images the covariance of 2048 features is singular, and the bias of FID grows quickly.
MIN_COMPARABLE_IMAGES = 2048


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
    ready = [GaussianStatistics.load(path) if is_statistics_file(path) else None for path in (first, second)]
    images = [None if found else open_image_set(path) for path, found in zip((first, second), ready, strict=True)]
    for path, statistics in zip((first, second), ready, strict=True):
        if statistics and statistics.dims != options.dims:
            raise UserError(f"{path}: statistics of {statistics.dims} dimensions, but --dims {options.dims}")
    extractor = _extractor(options) if any(images) else None
    sides = [
        statistics or _measure(path, extractor, options)
        for path, statistics in zip((first, second), ready, strict=True)
    ]
    distance = sides[0].distance(sides[1])
    if distributed.rank() == 0:
        print("FID: ", distance)
        counts = [side.count for side in sides if side.count is not None]
        if counts and min(counts) < MIN_COMPARABLE_IMAGES:
            print(f"too few images for a comparable FID: {min(counts)}, fewer than {MIN_COMPARABLE_IMAGES}")
        if extractor is not None and not extractor.is_standard:
            print(f"not the standard Inception weights: SHA-256 {extractor.weights_digest}")


def _save_statistics(source: Path, target: Path, options: argparse.Namespace) -> None:
    target = target if target.suffix == ".npz" else target.with_name(f"{target.name}.npz")
    if target.exists():
        raise UserError(f"{target}: file already exists. Choose another name or delete it.")
    open_image_set(source)
    extractor = _extractor(options)
    if distributed.rank() == 0:
        print(f"Saving statistics for {source}")
    statistics = _measure(source, extractor, options)
    if distributed.rank() == 0:
        statistics.save(target)


def _measure(path: Path, extractor: FeatureExtractor | None, options: argparse.Namespace) -> GaussianStatistics:
    assert extractor is not None
    images = open_image_set(path)
    workers = min(8, _cpus()) if options.num_workers is None else options.num_workers
    batches = images.batches(options.batch_size, workers)
    return summarize_features(batches, len(images), extractor, progress=path.name).statistics


def _extractor(options: argparse.Namespace) -> FeatureExtractor:
    name: str = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a torch device. Use cuda, cuda:0 or cpu.") from None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device = PartialState(cpu=device.type == "cpu").device or device
    try:
        return load_inception(options.inception_weights, options.dims, device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device}: not available on this machine ({error})") from None


def _cpus() -> int:
    """Return the number of CPUs available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vqvae2 fid", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("path", nargs=2, help="folder of images, or .npz of statistics (mu, sigma) or images (arr_0)")
    parser.add_argument("--batch-size", type=int, default=50, help="images in one pass of the network")
    parser.add_argument("--num-workers", type=int, help="processes that decode images; by default up to 8")
    parser.add_argument("--device", help="cuda, cuda:0 or cpu; cuda by default if available")
    parser.add_argument("--dims", type=int, default=2048, choices=DIMS, help="dimensions of the features")
    parser.add_argument("--save-stats", action="store_true", help="write statistics of the first path to the second")
    parser.add_argument("--inception-weights", type=Path, help="file of weights; by default torch's cache or download")
    return parser

"""The command `vqvae2 fid A B`: the Fréchet Inception distance between two image sets, compatible with pytorch-fid."""

import os
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from pydantic import Field
from tyro.conf import Positional

from sampling.evaluation.features import FeatureSummary, find_differences, is_statistics_file, summarize_features
from sampling.evaluation.image_sets import ImageSet, open_image_set
from sampling.output_folder import check_new_file
from vqvae2 import distributed
from vqvae2.command_line import Options
from vqvae2.errors import UserError, printable
from vqvae2.metrics.feature_extractor import FeatureExtractor
from vqvae2.metrics.frechet import GaussianStatistics
from vqvae2.metrics.pretrained_features import INCEPTION, NETWORKS_HELP, NetworkSetting, load_extractor

# With fewer images the covariance of 2048 features is singular, and the bias of FID grows quickly.
MIN_COMPARABLE_IMAGES = 2048


class FidOptions(Options):
    """Compute the FID of two sets of images as pytorch-fid does, or save the statistics of one.

    With --features, the Fréchet distance is computed in the features of another network.
    """

    paths: Positional[tuple[Path, Path]] = Field(
        description="folders or archives of images, or .npz files of statistics (mu, sigma) or images (arr_0)"
    )
    batch_size: int = Field(default=50, ge=1, description="images per pass of the network")
    num_workers: int | None = Field(
        default=None, ge=0, le=1024, description="processes that decode images; up to 8 if not given"
    )
    device: str | None = Field(default=None, description="cuda, cuda:0, cpu; cuda if available, if not given")
    dims: Literal[64, 192, 768, 2048] = Field(default=2048, description="number of Inception features")
    save_stats: bool = Field(default=False, description="write the statistics of the first path to the second")
    features: NetworkSetting = Field(default=INCEPTION, description=f"network: {NETWORKS_HELP}")
    inception_weights: Path | None = Field(
        default=None, description="weights file; from torch's cache or downloaded if not given"
    )


def main(options: FidOptions) -> None:
    """Run the command `vqvae2 fid`."""
    first, second = options.paths
    if options.features != INCEPTION:
        _check_without_inception(options)
    if options.save_stats:
        _save_statistics(first, second, options)
        return
    # Cheap checks of both sides come before the network is loaded.
    ready = [GaussianStatistics.load(path) if is_statistics_file(path) else None for path in (first, second)]
    images = [None if found else _open(path) for path, found in zip((first, second), ready, strict=True)]
    for path, statistics in zip((first, second), ready, strict=True):
        if statistics and statistics.dims != options.dims:
            raise UserError(f"{path}: statistics of {statistics.dims} dimensions, but --dims {options.dims}")
    extractor = _extractor(options) if any(images) else None
    sides = [
        FeatureSummary(statistics) if statistics else _measure(image_set, extractor, options, path.name)
        for path, statistics, image_set in zip((first, second), ready, images, strict=True)
    ]
    distance = sides[0].statistics.distance(sides[1].statistics)
    if distributed.get_rank() == 0:
        print("FID: " if options.features == INCEPTION else f"FD in features of {options.features}: ", distance)
        counts = [side.statistics.count for side in sides if side.statistics.count is not None]
        if counts and min(counts) < MIN_COMPARABLE_IMAGES:
            term = "FID" if options.features == INCEPTION else "FD"
            print(f"too few images for a comparable {term}: {min(counts)}, fewer than {MIN_COMPARABLE_IMAGES}")
        if extractor is not None and not extractor.is_standard:
            print(f"not the standard weights of {options.features}: SHA-256 {extractor.weights_digest}")
        subjects = (printable(f"images of {first} are"), printable(f"those of {second} are"))
        formats = [image_set.formats if image_set else () for image_set in images]
        for warning in find_differences(subjects, (sides[0].image_size, sides[1].image_size), (formats[0], formats[1])):
            print(warning)


def _check_without_inception(options: FidOptions) -> None:
    """Raise UserError if an option or a path is only for Inception features."""
    set_options = {"--dims": options.dims != 2048, "--inception-weights": options.inception_weights is not None}
    for name, is_set in {**set_options, "--save-stats": options.save_stats}.items():
        if is_set:
            raise UserError(f"{name}: only for Inception features, but --features is {options.features}. Remove it.")
    for path in options.paths:
        if is_statistics_file(path):
            raise UserError(
                f"{path}: statistics of Inception features. Give a folder for --features {options.features}."
            )


def _save_statistics(source: Path, target: Path, options: FidOptions) -> None:
    if target.suffix != ".npz":
        target = target.resolve().with_name(f"{target.resolve().name}.npz")
    check_new_file(target)
    images = _open(source)
    extractor = _extractor(options)
    if distributed.get_rank() == 0:
        print(printable(f"Saving statistics for {source}"))
    summary = _measure(images, extractor, options, source.name)
    if distributed.get_rank() == 0:
        summary.statistics.save(target)


def _open(path: Path) -> ImageSet:
    images = open_image_set(path)
    if len(images) < 2:
        raise UserError(f"{path}: found one image, but FID needs at least two.")
    return images


def _measure(
    images: ImageSet | None, extractor: FeatureExtractor | None, options: FidOptions, name: str
) -> FeatureSummary:
    assert images is not None
    assert extractor is not None
    workers = min(8, _cpus()) if options.num_workers is None else options.num_workers
    batches = images.batches(options.batch_size, workers)
    return summarize_features(batches, len(images), extractor, progress=printable(name))


def _extractor(options: FidOptions) -> FeatureExtractor:
    name: str = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a torch device. Use cuda, cuda:0 or cpu.") from None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device = PartialState(cpu=device.type == "cpu").device or device
    try:
        return load_extractor(options.features, options.inception_weights, device, options.dims)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device}: not available on this machine ({error})") from None


def _cpus() -> int:
    """Return the number of CPUs available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

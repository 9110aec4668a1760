"""The command `vqvae2 sample`: sample images coarse to fine into a folder with a grid and a manifest."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from accelerate.utils import gather_object
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from sampling.evaluation.rejection import ClassifierRejection
from sampling.output_folder import (
    SampleManifest,
    check_folder,
    default_output,
    image_path,
    is_complete_image,
    manifest_path,
    next_free_folder,
    read_manifest,
    write_grids,
    write_npz,
)
from sampling.params import SamplingConfig
from sampling.pipeline import PipelineConfig, VQVAE2Pipeline
from sampling.processes import processes
from sampling.run_config import RunConfig, parse_with_run_defaults
from vqvae2 import files
from vqvae2.command_line import Options, parse
from vqvae2.data.images import to_uint8
from vqvae2.hub import SOURCE_HELP, pipeline_folder
from vqvae2.pictures import save_image
from vqvae2.run_folder import RunFolder


class SampleOptions(Options, SamplingConfig):
    """Sample new images from a trained run, or from a saved pipeline.

    Settings that are not given are those of the run or pipeline. After the name of a run, --help lists its values.
    """

    run: Positional[Path] = Field(description=SOURCE_HELP)
    keep_fraction: float | None = Field(
        default=None, gt=0, le=1, description="rejection sampling: sample more images and keep this fraction"
    )
    classifier: str | None = Field(
        default=None, description="classifier for rejection sampling: a torchvision name such as resnet50, or a file"
    )
    out: Path | None = Field(
        default=None, description="output folder; RUN/samples if not given, or NAME-samples for another model"
    )

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], prog: str) -> Self:
        options = parse_with_run_defaults(cls, "sampling", arguments, prog)
        if (config := RunFolder(options.run).config).is_file():
            run = RunConfig.from_resolved_yaml(config)
            return options.complete(run.sampling, run.levels)
        if options.run.is_dir() and not RunFolder(options.run).pipeline_config.is_file():
            RunFolder.existing(options.run)
        saved = PipelineConfig.read(pipeline_folder(options.run))
        options = parse(cls, arguments, prog, default=cls(run=options.run, **dict(saved.sampling)))
        return options.complete(saved.sampling, saved.levels)

    @property
    def config(self) -> SamplingConfig:
        """The settings that are also in the run's config."""
        return SamplingConfig(**{name: getattr(self, name) for name in SamplingConfig.model_fields})


class SampledImage(NamedTuple):
    """One sampled image."""

    number: int
    image: UInt8[Tensor, "c h w"]


def sample_images(
    pipeline: VQVAE2Pipeline, config: SamplingConfig, batch_size: int, numbers: Sequence[int], show_progress: bool
) -> Iterator[SampledImage]:
    """Yield this process's share of the images with the given numbers, in ascending order.

    A share consists of whole batches; see `VQVAE2Pipeline.sample_batches`.
    """
    process, batches = processes(), sorted({number // batch_size for number in numbers})
    share = set(batches[process.process_index :: process.num_processes])
    numbers = [number for number in numbers if number // batch_size in share]
    total, started = pipeline.num_codes * len(numbers), time.monotonic()
    hidden = not (show_progress and numbers)
    with tqdm(desc="samples", total=total, unit="code", unit_scale=True, disable=hidden) as bar:
        done = 0
        for batch in pipeline.sample_batches(numbers, config, bar.update, batch_size):
            yield from map(SampledImage, numbers[done : done + len(batch)], to_uint8(batch).cpu())
            done += len(batch)
            bar.set_postfix_str(f"{done / (time.monotonic() - started):.3g} images/s")


def common_batch_size(pipeline: VQVAE2Pipeline, config: SamplingConfig) -> int:
    """Return the batch size of a job, the same on every process although their free memory differs."""
    return min(gather_object([pipeline.job_batch_size(config)]))


def sample_run(run: Path, config: SamplingConfig, out: Path | None = None) -> Path:
    """Sample the images of a run, or of a saved pipeline, into a folder. Return the folder; complete images are kept.

    The folder is `out`, or `samples` in the run, or `samples-2`, … if that holds images made with other settings. For
    another model than a run, it is NAME-samples in the working directory. It contains images/, grid.png, classes.png if
    there are labels, samples.npz if the format is npz, manifest.json, and summary.json with the time.
    """
    process = processes()
    pipeline = VQVAE2Pipeline.from_pretrained(run, torch.device(process.device or "cpu"))
    pipeline.check_params(config.params)
    manifest = _manifest(pipeline, config)
    folder = out or next_free_folder(default_output(run, "samples"), manifest)
    check_folder(folder, manifest)
    begun = read_manifest(folder, SampleManifest)
    batch_size = (begun and begun.batch_size) or common_batch_size(pipeline, config)
    if process.is_main_process:
        files.lock_folder(folder)
        if not manifest_path(folder).is_file():
            manifest.model_copy(update={"batch_size": batch_size}).write(folder)
    size, channels = pipeline.autoencoder.size, pipeline.autoencoder.image_channels
    paths = [image_path(folder, number, manifest.format) for number in range(config.count)]
    missing = [number for number, path in enumerate(paths) if not is_complete_image(path, size, channels)]
    process.wait_for_everyone()  # so that every process finds the same images missing
    started = time.monotonic()
    for sample in sample_images(pipeline, config, batch_size, missing, process.is_main_process):
        save_image(paths[sample.number], sample.image)
    process.wait_for_everyone()
    if process.is_main_process:
        if missing:
            _write_summary(folder / "summary.json", len(missing), time.monotonic() - started)
        grids = ["grid.png", *(["classes.png"] if manifest.labels else [])]
        if missing or not all(is_complete_image(folder / name) for name in grids):
            write_grids(folder, config.count, manifest.labels, pipeline.class_names, manifest.format)
        if config.format == "npz":
            write_npz(folder, config.count)
    process.wait_for_everyone()
    return folder


def _write_summary(path: Path, images: int, seconds: float) -> None:
    """Print the sampling rate, and record it unless an earlier command already has."""
    rate = images / seconds
    tqdm.write(f"samples: {images:,} images in {seconds:.1f} s, {rate:.3g} images/s", sys.stderr)
    if not path.is_file():
        files.write_json(path, {"seconds": round(seconds, 1), "images": images, "images_per_second": round(rate, 4)})


def _manifest(pipeline: VQVAE2Pipeline, config: SamplingConfig) -> SampleManifest:
    labels = pipeline.labels_of(range(config.count), config.classes)
    return SampleManifest(
        seed=config.seed,
        count=config.count,
        sampling_params=config.recorded(pipeline.levels),
        labels=None if labels is None else tuple(labels.tolist()),
        class_names=pipeline.class_names,
        autoencoder=str(pipeline.autoencoder.digest),
        priors=tuple(str(prior.digest) for prior in pipeline.priors),
        image_size=pipeline.autoencoder.size,
        format="webp" if config.format == "webp" else "png",
        torch=torch.__version__,
    )


def main(options: SampleOptions) -> None:
    """Run the command `vqvae2 sample`."""
    config = options.config
    rejection = ClassifierRejection.from_options(options.run, options.keep_fraction, options.classifier)
    if rejection:
        settings = rejection.candidate_settings(config.count, config.classes)
        if config.format == "npz":  # of the accepted images only
            settings["format"] = "png"
        candidates = sample_run(options.run, config.model_copy(update=settings), options.out)
        folder = rejection.keep_best(candidates, config.batch_size)
        if config.format == "npz" and processes().is_main_process:
            write_npz(folder, config.count)
    else:
        folder = sample_run(options.run, config, options.out)
    if processes().is_main_process:
        print(f"{folder / 'grid.png'}\n{folder / 'images'}")

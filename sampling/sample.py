"""The command `vqvae2 sample`: images coarse to fine, as PNGs, a grid and a manifest that says how they were made."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from tqdm import tqdm

from sampling.evaluation.rejection import ClassifierRejection
from sampling.output_folder import check_folder, free_folder, image_path, write_grids
from sampling.params import SamplingParams, add_options
from sampling.pipeline import VQVAE2Pipeline
from sampling.processes import processes
from vqvae2 import files
from vqvae2.config import Config
from vqvae2.data.images import to_bytes
from vqvae2.pictures import save_png
from vqvae2.run_folder import RunFolder


class SamplingConfig(Config):
    """What is sampled."""

    count: int = Field(default=64, ge=1, description="images")
    seed: int = Field(default=0, ge=0)
    classes: tuple[int, ...] = Field(default=(), description="labels, used by turns; all of them where not given")
    choice: SamplingParams = SamplingParams()
    batch_size: int = Field(default=16, ge=1, description="images sampled at once, at most, on each process")
    memory: float | None = Field(
        default=None, gt=0, description="GiB that walks may fill; half of what is free where not given"
    )


class Sample(NamedTuple):
    """One sampled image."""

    number: int
    image: torch.Tensor  # uint8 (C, H, W)


def samples(pipeline: VQVAE2Pipeline, config: SamplingConfig, numbers: list[int], show: bool) -> Iterator[Sample]:
    """The images with these numbers, a batch at a time."""
    positions = pipeline.positions * len(numbers)
    size = pipeline.batch_that_fits(min(config.batch_size, len(numbers)), config.choice, config.memory)
    started = time.monotonic()
    with tqdm(desc="samples", total=positions, unit="code", unit_scale=True, disable=not (show and numbers)) as bar:
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            labels = pipeline.labels_of(batch, config.classes)
            codes = pipeline.sample_codes(batch, labels, config.seed, config.choice, progress=bar.update)
            for number, image in zip(batch, to_bytes(pipeline.autoencoder.decode_codes(codes)).cpu(), strict=True):
                yield Sample(number, image)
            bar.set_postfix_str(f"{(start + len(batch)) / (time.monotonic() - started):.3g} images/s")


def sample_run(run: Path, config: SamplingConfig, out: Path | None = None) -> Path:
    """Sample images of a run into a folder, going on with the ones that are missing; the folder.

    The folder is `out`, or `samples` in the run, or `samples-2` and so on where that holds images made otherwise.
    Beside the images lie grid.png, classes.png where there are labels, manifest.json, and summary.json with the time
    that all processes together took.
    """
    process = processes()
    pipeline = VQVAE2Pipeline.load(run, torch.device(process.device or "cpu"))
    pipeline.check(config.choice)
    manifest = _manifest(pipeline, config)
    folder = out or free_folder(RunFolder(run).samples, manifest)
    check_folder(folder, manifest)
    if process.is_main_process:
        files.write_json(folder / "manifest.json", manifest)
    missing = [number for number in range(config.count) if not image_path(folder, number).is_file()]
    process.wait_for_everyone()  # until every process has seen the same images missing
    started = time.monotonic()
    mine = missing[process.process_index :: process.num_processes]
    for sample in samples(pipeline, config, mine, process.is_main_process):
        save_png(image_path(folder, sample.number), sample.image)
    process.wait_for_everyone()
    if process.is_main_process:
        if missing:
            _note_time(folder / "summary.json", len(missing), time.monotonic() - started)
        grids = ["grid.png", *(["classes.png"] if manifest["labels"] else [])]
        if missing or not all((folder / name).is_file() for name in grids):
            write_grids(folder, config.count, manifest["labels"], pipeline.classes)
    process.wait_for_everyone()
    return folder


def _note_time(path: Path, images: int, seconds: float) -> None:
    """Say how fast images were made, and keep it, but for the few that a repeated command makes again."""
    rate = images / seconds
    tqdm.write(f"samples: {images:,} images in {seconds:.1f} s, {rate:.3g} images/s", sys.stderr)
    if not path.is_file():
        files.write_json(path, {"seconds": round(seconds, 1), "images": images, "images_per_second": round(rate, 4)})


def _manifest(pipeline: VQVAE2Pipeline, config: SamplingConfig) -> dict[str, Any]:
    labels = pipeline.labels_of(range(config.count), config.classes)
    return {
        "seed": config.seed,
        "count": config.count,
        "sampling_params": config.choice.record(pipeline.levels),
        "labels": None if labels is None else labels.tolist(),
        "class_names": list(pipeline.classes),
        "autoencoder": pipeline.autoencoder.digest,
        "priors": [prior.digest for prior in pipeline.priors],
        "image_size": list(pipeline.autoencoder.size),
        "format": "png",
        "torch": torch.__version__,
    }


def main(arguments: list[str]) -> None:
    """The command `vqvae2 sample`."""
    parser = argparse.ArgumentParser(prog="vqvae2 sample", description="Sample new images from a trained run.")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--count", type=int, help="how many images")
    parser.add_argument("--seed", type=int, help="image k depends on the seed and k alone")
    parser.add_argument("--classes", type=numbers, help="labels, used by turns: 207,250")
    add_options(parser)
    parser.add_argument("--batch-size", type=int, help="images sampled at once; fewer where memory is short")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory to fill; half of what is free by default")
    parser.add_argument("--keep-fraction", type=float, metavar="FRACTION", help="sample more, keep this share")
    parser.add_argument("--classifier", help="which keeps them: resnet50 or another of torchvision, or a local file")
    parser.add_argument("--out", type=Path, help="folder to write to; RUN/samples by default")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    run, out = given.pop("run"), given.pop("out", None)
    config = SamplingConfig.load(RunFolder.existing(run).config, "sampling")
    rejection = ClassifierRejection.from_options(run, given.pop("keep_fraction", None), given.pop("classifier", None))
    choice = {name: given.pop(name) for name in SamplingParams.model_fields if name in given}
    settings = config.plain() | given | {"choice": config.choice.plain() | choice}
    config = SamplingConfig.parse(settings, "vqvae2 sample")
    if rejection:
        config = config.model_copy(update=rejection.candidate_settings(config.count, config.classes))
    folder = sample_run(run, config, out)
    if rejection:
        folder = rejection.keep_best(folder, config.batch_size)
    if processes().is_main_process:
        print(f"{folder / 'grid.png'}\n{folder / 'images'}")


def numbers(text: str) -> tuple[int, ...]:
    """Reads `207,250`, for argparse."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"expected numbers with commas between them, such as 207,250, not {text!r}"
        raise argparse.ArgumentTypeError(message) from None

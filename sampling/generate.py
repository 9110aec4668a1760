"""The command `vqvae2 sample`: images coarse to fine, as PNGs, a grid and a manifest that says how they were made."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from pydantic import Field
from tqdm import tqdm

from sampling.decode import Choice
from sampling.hierarchy import Generator
from sampling.rejection import Rejection
from vqvae2 import files
from vqvae2.config import Config
from vqvae2.data.images import to_bytes
from vqvae2.errors import UserError
from vqvae2.pictures import read_png, save_grid, save_png
from vqvae2.run_folder import RunFolder

_GRID_IMAGES = 64


class SamplingConfig(Config):
    """What is sampled."""

    count: int = Field(default=64, ge=1, description="images")
    seed: int = Field(default=0, ge=0)
    classes: tuple[int, ...] = Field(default=(), description="labels, used by turns; all of them where not given")
    choice: Choice = Choice()
    batch_size: int = Field(default=16, ge=1, description="images sampled at once, on each process")


class Sample(NamedTuple):
    """One sampled image."""

    number: int
    image: torch.Tensor  # uint8 (C, H, W)


def samples(generator: Generator, config: SamplingConfig, numbers: list[int], show: bool) -> Iterator[Sample]:
    """The images with these numbers, a batch at a time."""
    positions = generator.positions * len(numbers)
    with tqdm(desc="samples", total=positions, unit="code", unit_scale=True, disable=not (show and numbers)) as bar:
        for start in range(0, len(numbers), config.batch_size):
            batch = numbers[start : start + config.batch_size]
            labels = generator.labels_of(batch, config.classes)
            codes = generator.sample_codes(batch, labels, config.seed, config.choice, progress=bar.update)
            for number, image in zip(batch, to_bytes(generator.autoencoder.decode_codes(codes)).cpu(), strict=True):
                yield Sample(number, image)


def sample_run(run: Path, config: SamplingConfig, out: Path | None = None) -> Path:
    """Sample images of a run into a folder, going on with the ones that are missing; the folder.

    The folder is `out`, or `samples` in the run, or `samples-2` and so on where that holds images made otherwise.
    """
    process = PartialState()
    generator = Generator.load(run, torch.device(process.device or "cpu"))
    manifest = _manifest(generator, config)
    folder = out or _free_folder(RunFolder(run).samples, manifest)
    found = _read_manifest(folder)
    if found is not None and found != manifest:
        raise UserError(f"{folder}: holds samples made with other settings; choose another folder with --out")
    images = folder / "images"
    if process.is_main_process:
        files.write_json(folder / "manifest.json", manifest)
    process.wait_for_everyone()
    missing = [number for number in range(config.count) if not _image(images, number).is_file()]
    mine = missing[process.process_index :: process.num_processes]
    for sample in samples(generator, config, mine, process.is_main_process):
        save_png(_image(images, sample.number), sample.image)
    process.wait_for_everyone()
    if process.is_main_process and (missing or not (folder / "grid.png").is_file()):
        _write_grid(folder, config.count)
    process.wait_for_everyone()
    return folder


def _manifest(generator: Generator, config: SamplingConfig) -> dict[str, Any]:
    labels = generator.labels_of(range(config.count), config.classes)
    return {
        "seed": config.seed,
        "count": config.count,
        "choice": config.choice.plain(),
        "labels": None if labels is None else labels.tolist(),
        "class_names": list(generator.classes),
        "autoencoder": generator.autoencoder.digest,
        "priors": [prior.digest for prior in generator.priors],
        "image_size": list(generator.autoencoder.size),
        "format": "png",
        "torch": torch.__version__,
    }


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    return files.read_json(path) if path.is_file() else None


def _free_folder(first: Path, manifest: dict[str, Any]) -> Path:
    """The first of `samples`, `samples-2`, … that is new or holds images made with these very settings."""
    folder, number = first, 1
    while _read_manifest(folder) not in (None, manifest):
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return folder


def _image(images: Path, number: int) -> Path:
    return images / f"{number:06d}.png"


def _write_grid(folder: Path, count: int) -> None:
    count = min(count, _GRID_IMAGES)
    shown = [read_png(_image(folder / "images", number)) for number in range(count)]
    save_grid(folder / "grid.png", torch.stack(shown), columns=max(1, round(count**0.5)))


def main(arguments: list[str]) -> None:
    """The command `vqvae2 sample`."""
    parser = argparse.ArgumentParser(prog="vqvae2 sample", description="Sample new images from a trained run.")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--count", type=int, help="how many images")
    parser.add_argument("--seed", type=int, help="image k depends on the seed and k alone")
    parser.add_argument("--classes", type=_numbers, help="labels, used by turns: 207,250")
    parser.add_argument("--temperature", type=float, help="below 1 plays safe; 0 always takes the likeliest code")
    parser.add_argument("--top-k", type=int, help="choose among the k likeliest codes; 0 for all")
    parser.add_argument("--top-p", type=float, help="choose among the likeliest codes of this total probability")
    parser.add_argument("--batch-size", type=int, help="images sampled at once")
    parser.add_argument("--reject-to", type=float, metavar="FRACTION", help="sample more, keep this share")
    parser.add_argument("--classifier", help="which keeps them: resnet50 or another of torchvision, or a local file")
    parser.add_argument("--out", type=Path, help="folder to write to; RUN/samples by default")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    run, out = given.pop("run"), given.pop("out", None)
    config = SamplingConfig.load(RunFolder.existing(run).config, "sampling")
    rejection = Rejection.plan(run, given.pop("reject_to", None), given.pop("classifier", None))
    choice = {name: given.pop(name) for name in ("temperature", "top_k", "top_p") if name in given}
    settings = config.plain() | given | {"choice": config.choice.plain() | choice}
    config = SamplingConfig.parse(settings, "vqvae2 sample")
    if rejection:
        config = config.model_copy(update=rejection.enlarge(config.count, config.classes))
    folder = sample_run(run, config, out)
    if rejection:
        folder = rejection.keep_best(folder, config.batch_size)
    if PartialState().is_main_process:
        print(f"{folder / 'grid.png'}\n{folder / 'images'}")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"expected numbers with commas between them, such as 207,250, not {text!r}"
        raise argparse.ArgumentTypeError(message) from None

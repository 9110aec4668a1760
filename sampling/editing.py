"""The commands `vqvae2 complete` and `vqvae2 vary`: new images that share a part, or the coarse levels, of others."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor
from tqdm import tqdm

from sampling.masks import HALVES, keep_masked, read_mask
from sampling.output_folder import check_folder, check_new, free_folder, read_manifest
from sampling.params import SamplingParams, add_options
from sampling.pipeline import VQVAE2Pipeline
from sampling.processes import processes
from sampling.sample import numbers
from sampling.sample_level import PartialCodes
from vqvae2 import files
from vqvae2.data.images import read_image, to_float, to_uint8
from vqvae2.pictures import hwc_to_chw, save_grid, save_png
from vqvae2.run_folder import RunFolder

_HIDDEN = 127  # the grey of pixels outside a mask


@dataclass(frozen=True)
class Edit:
    """What to make of which images."""

    kind: str  # "inpaintings" or "variations", the name of the folder
    images: UInt8[Tensor, "b c h w"]
    shown: UInt8[Tensor, "b c h w"]  # what is kept of them, as a person sees it
    known: tuple[PartialCodes, ...]
    variants: int
    seed: int
    labels: tuple[int, ...]
    choices: SamplingParams

    def write(self, pipeline: VQVAE2Pipeline, manifest: dict[str, Any], first: Path, out: Path | None) -> Path:
        """Sample, and write grid.png, images/ and manifest.json into `out` or the first free folder, all at once."""
        folder = out or free_folder(first, manifest)
        check_folder(folder, manifest)
        if read_manifest(folder) == manifest:
            return folder
        check_new(folder)
        pipeline.check(self.choices)
        total = pipeline.positions * self.variants * len(self.images)
        with tqdm(desc=self.kind, total=total, unit="code", unit_scale=True) as bar:
            codes = pipeline.resample(self.known, self.labels, self.variants, self.seed, self.choices, bar.update)
        made = to_uint8(pipeline.decode(codes)).cpu().unflatten(0, (len(self.images), self.variants))
        rows = torch.cat([self.images[:, None], self.shown[:, None], made], 1)
        with files.atomic_write(folder) as partial:
            for image, row in enumerate(made):
                for variant, picture in enumerate(row):
                    save_png(partial / "images" / f"{image:06d}-{variant:02d}.png", picture)
            save_grid(partial / "grid.png", rows.flatten(0, 1), columns=rows.shape[1])
            files.write_json(partial / "manifest.json", manifest)
        return folder

    def manifest(self, pipeline: VQVAE2Pipeline, paths: Sequence[Path], keep: Any) -> dict[str, Any]:
        """How the images are made."""
        return {
            "kind": self.kind,
            "images": [{"name": path.name, "digest": files.digest(path)} for path in paths],
            "keep": keep,
            "variants": self.variants,
            "seed": self.seed,
            "labels": list(self.labels),
            "choice": self.choices.record(pipeline.levels),
            "autoencoder": pipeline.autoencoder.digest,
            "priors": [prior.digest for prior in pipeline.priors],
            "torch": torch.__version__,
        }


def inpaint(arguments: list[str]) -> None:
    """The command `vqvae2 complete`."""
    parser = _parser("inpaint", "KeepOptions a part of images and sample the rest.")
    parser.add_argument(
        "--keep", required=True, metavar="WHAT", help=f"{', '.join(HALVES)}, or a PNG whose white is kept"
    )

    def plan(
        pipeline: VQVAE2Pipeline, images: Tensor, options: argparse.Namespace
    ) -> tuple[Any, Tensor, Sequence[PartialCodes]]:
        mask = read_mask(options.keep, pipeline.autoencoder.size)
        keep = options.keep if options.keep in HALVES else {"digest": files.digest(Path(options.keep))}
        known = keep_masked(_encode(pipeline, images), mask, pipeline.autoencoder.map_specs)
        return keep, _hide(images, mask), known

    _run(parser.parse_args(arguments), "inpaintings", plan)


def variations(arguments: list[str]) -> None:
    """The command `vqvae2 vary`."""
    parser = _parser("variations", "KeepOptions the coarse levels of images and sample the finer ones.")
    parser.add_argument("--keep-levels", type=int, default=1, help="how many of the coarsest levels are kept")

    def plan(
        pipeline: VQVAE2Pipeline, images: Tensor, options: argparse.Namespace
    ) -> tuple[Any, Tensor, Sequence[PartialCodes]]:
        codes = _encode(pipeline, images)
        known = pipeline.keep_levels(codes, options.keep_levels)
        return options.keep_levels, to_uint8(pipeline.decode(codes)).cpu(), known

    _run(parser.parse_args(arguments), "variations", plan)


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"vqvae2 {name}", description=about)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    parser.add_argument("--variants", type=_whole(1), default=4, help="how many new images of each")
    parser.add_argument(
        "--seed", type=_whole(0), default=0, help="variant v of image k depends on the seed, k and v alone"
    )
    parser.add_argument("--classes", type=numbers, default=(), help="the images' labels, used by turns: 207,250")
    add_options(parser)
    parser.add_argument("--batch-size", type=_whole(1), default=16, help="images sampled at once")
    parser.add_argument("--out", type=Path, help="folder to write to; a new one in RUN by default")
    return parser


def _run(
    options: argparse.Namespace,
    kind: str,
    plan: Callable[[VQVAE2Pipeline, Tensor, argparse.Namespace], tuple[Any, Tensor, Sequence[PartialCodes]]],
) -> None:
    process = processes()
    if not process.is_main_process:
        return
    folder = RunFolder.existing(options.run)
    pipeline = VQVAE2Pipeline.load(folder.path, process.device or "cpu", options.batch_size)
    given = {name: getattr(options, name) for name in SamplingParams.model_fields if getattr(options, name) is not None}
    choices = SamplingParams.parse(given, f"vqvae2 {kind}")
    size, channels = pipeline.autoencoder.size, pipeline.autoencoder.image_channels
    images = torch.stack([hwc_to_chw(read_image(path, size, channels)) for path in options.images])
    keep, shown, known = plan(pipeline, images, options)
    edit = Edit(kind, images, shown, tuple(known), options.variants, options.seed, options.classes, choices)
    pipeline.check_labels(edit.labels)
    manifest = edit.manifest(pipeline, options.images, keep)
    written = edit.write(pipeline, manifest, folder.path / kind, options.out)
    kept = (f"{name} {_share(level.keep)}" for name, level in zip(pipeline.levels, known, strict=True))
    columns = "original, kept" if kind == "inpaintings" else "original, reconstruction"
    print(f"{written / 'grid.png'}\n{written / 'images'}\ncolumns: {columns}, variants\nkept codes: {', '.join(kept)}")


def _encode(pipeline: VQVAE2Pipeline, images: UInt8[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
    return pipeline.autoencoder.encode(to_float(images.to(pipeline.device)))


def _hide(images: UInt8[Tensor, "b c h w"], mask: Bool[Tensor, "h w"]) -> UInt8[Tensor, "b c h w"]:
    return torch.where(mask, images, torch.full_like(images, _HIDDEN))


def _share(keep: Bool[Tensor, "b h w"]) -> str:
    return f"{int(keep[0].sum()):,} of {keep[0].numel():,}"


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, not {text!r}")
        return int(text)

    return parse

"""The commands `vqvae2 inpaint` and `vqvae2 variations`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, UInt8
from pydantic import Field
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from sampling.editing import sample_variants
from sampling.labels import class_numbers
from sampling.masks import HALVES, keep_coarsest, keep_masked, read_mask
from sampling.output_folder import Manifest, check_folder, check_new, default_output, next_free_folder, read_manifest
from sampling.params import ClassLabels, SamplingParams
from sampling.pipeline import VQVAE2Pipeline
from sampling.processes import processes
from sampling.sample_level import PartialCodes
from vqvae2 import files
from vqvae2.command_line import Options
from vqvae2.config import Config
from vqvae2.data.image_io import MAX_PIXELS
from vqvae2.data.images import read_images, to_float, to_uint8
from vqvae2.hub import SOURCE_HELP
from vqvae2.pictures import save_grid, save_image

_MASKED_GRAY = 127  # of the pixels outside a mask in the grid


class EditOptions(Options, SamplingParams):
    """Options of both commands."""

    run: Positional[Path] = Field(description=SOURCE_HELP)
    images: Positional[tuple[Path, ...]] = Field(min_length=1, description="image files")
    variants: int = Field(default=4, ge=1, le=2**16, description="new images per image")
    seed: int = Field(
        default=0,
        ge=0,
        le=2**63 - 1,
        description="variant v of image k depends on the seed, k and v, and by rounding on the batch size",
    )
    classes: ClassLabels = Field(
        default=(), description="names or numbers of the classes of the images, to cycle through"
    )
    batch_size: int = Field(default=16, ge=1, le=2**16, description="images sampled at once")
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=2**31,
        description="images with more pixels are unreadable, because of their memory",
    )
    out: Path | None = Field(
        default=None,
        description="output folder; a new one in the run folder, or for another model in the working directory",
    )


class InpaintOptions(EditOptions):
    """Keep a part of each image and sample the rest, several times."""

    keep: str = Field(
        description=f"what to keep: {', '.join(HALVES)}, or a picture of the size of the "
        "photographs or of the model's images, whose white and opaque pixels are kept"
    )


class VariationsOptions(EditOptions):
    """Keep the coarse levels of each image and sample the fine levels, several times."""

    keep_levels: int = Field(default=1, ge=1, description="number of coarsest levels to keep")


class EditedImage(Config):
    """An edited image in a manifest."""

    name: str
    digest: str


class EditManifest(Manifest):
    """How the images in a folder of `vqvae2 inpaint` or `vqvae2 variations` were made."""

    kind: Literal["inpaintings", "variations"]
    images: tuple[EditedImage, ...]
    keep: str | int | dict[str, str]  # half of the image, number of levels, or digest of the mask
    variants: int
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Edit:
    """One edit of a batch of images."""

    kind: Literal["inpaintings", "variations"]  # also the name of the folder
    images: UInt8[Tensor, "b c h w"]
    shown: UInt8[Tensor, "b c h w"]  # what is kept, for the grid
    partial: Sequence[PartialCodes]  # finest level first
    keep: str | int | dict[str, str]  # for the manifest
    options: EditOptions

    def write(self, pipeline: VQVAE2Pipeline) -> Path:
        """Sample, and write grid.png, images/ and manifest.json to the output folder, which is complete or absent."""
        manifest, options = self._manifest(pipeline), self.options
        folder = options.out or next_free_folder(default_output(options.run, self.kind), manifest)
        check_folder(folder, manifest)
        if read_manifest(folder, EditManifest) == manifest:
            return folder
        check_new(folder)
        pipeline.check_params(options.params)
        total = pipeline.num_codes * options.variants * len(self.images)
        with tqdm(desc=self.kind, total=total, unit="code", unit_scale=True) as bar:
            codes = sample_variants(
                pipeline, self.partial, options.classes, options.variants, options.seed, options.params, bar.update
            )
        sampled = to_uint8(pipeline.decode(codes)).cpu().unflatten(0, (len(self.images), options.variants))
        rows = torch.cat([self.images[:, None], self.shown[:, None], sampled], 1)
        with files.atomic_write(folder) as partial:
            for image, row in enumerate(sampled):
                for variant, picture in enumerate(row):
                    save_image(partial / "images" / f"{image:06d}-{variant:02d}.png", picture)
            save_grid(partial / "grid.png", rows.flatten(0, 1), columns=rows.shape[1])
            manifest.write(partial)
        return folder

    def _manifest(self, pipeline: VQVAE2Pipeline) -> EditManifest:
        options = self.options
        return EditManifest(
            kind=self.kind,
            images=tuple(EditedImage(name=path.name, digest=files.digest(path)) for path in options.images),
            keep=self.keep,
            variants=options.variants,
            seed=options.seed,
            labels=class_numbers(options.classes, pipeline.class_names),
            sampling_params=options.params.recorded(pipeline.levels),
            autoencoder=str(pipeline.autoencoder.digest),
            priors=tuple(str(prior.digest) for prior in pipeline.priors),
            torch=torch.__version__,
        )


def inpaint(options: InpaintOptions) -> None:
    """Run the command `vqvae2 inpaint`."""
    if not processes().is_main_process:
        return
    pipeline, images = _load(options)
    mask = read_mask(options.keep, pipeline.autoencoder.size, options.images)
    keep = options.keep if options.keep in HALVES else {"digest": files.digest(Path(options.keep))}
    partial = keep_masked(_encode(pipeline, images), mask, pipeline.autoencoder.map_specs)
    edit = Edit("inpaintings", images, _gray_out(images, mask), partial, keep, options)
    _write(pipeline, edit, "original, kept part, variants")


def variations(options: VariationsOptions) -> None:
    """Run the command `vqvae2 variations`."""
    if not processes().is_main_process:
        return
    pipeline, images = _load(options)
    codes = _encode(pipeline, images)
    partial = keep_coarsest(codes, options.keep_levels)
    reconstructions = to_uint8(pipeline.decode(codes)).cpu()
    edit = Edit("variations", images, reconstructions, partial, options.keep_levels, options)
    _write(pipeline, edit, "original, reconstruction, variants")


def _load(options: EditOptions) -> tuple[VQVAE2Pipeline, UInt8[Tensor, "b c h w"]]:
    pipeline = VQVAE2Pipeline.from_pretrained(options.run, processes().device or "cpu", options.batch_size)
    size, channels = pipeline.autoencoder.size, pipeline.autoencoder.image_channels
    return pipeline, read_images(options.images, size, channels, options.max_pixels)


def _write(pipeline: VQVAE2Pipeline, edit: Edit, columns: str) -> None:
    folder = edit.write(pipeline)
    kept = (
        f"{name} {int(partial.keep[0].sum()):,} of {partial.keep[0].numel():,}"
        for name, partial in zip(pipeline.levels, edit.partial, strict=True)
    )
    print(f"{folder / 'grid.png'}\n{folder / 'images'}\ncolumns: {columns}\nkept codes: {', '.join(kept)}")


def _encode(pipeline: VQVAE2Pipeline, images: UInt8[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
    return pipeline.autoencoder.encode(to_float(images.to(pipeline.device)))


def _gray_out(images: UInt8[Tensor, "b c h w"], mask: Bool[Tensor, "h w"]) -> UInt8[Tensor, "b c h w"]:
    return torch.where(mask, images, torch.full_like(images, _MASKED_GRAY))

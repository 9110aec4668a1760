"""The command `vqvae2 reconstruct`: images beside their reconstructions, or a folder of reconstructions."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from sampling.output_folder import check_new, default_output
from sampling.processes import processes
from vqvae2 import files
from vqvae2.command_line import Options
from vqvae2.data.image_io import MAX_PIXELS
from vqvae2.data.images import DataConfig, ImageDataset, read_image, to_float, to_uint8
from vqvae2.data.sources import open_source
from vqvae2.data.sources.base import is_image
from vqvae2.errors import UserError
from vqvae2.hub import SOURCE_HELP
from vqvae2.models import Autoencoder
from vqvae2.pictures import hwc_to_chw, save_grid, save_image
from vqvae2.run_folder import level_names

_BATCH = 8  # images encoded at once


class ReconstructOptions(Options):
    """Encode and decode images: a picture of images beside their reconstructions, or reconstructions of a folder."""

    run: Positional[Path] = Field(description=SOURCE_HELP)
    images: Positional[tuple[Path, ...]] = Field(
        min_length=1, description="image files, or one folder or archive: each of its images is written as a PNG"
    )
    levels: bool = Field(
        default=False, description="also show reconstructions without the finer levels: top, then top and middle, …"
    )
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=2**31,
        description="images with more pixels are unreadable, because of their memory",
    )
    out: Path | None = Field(
        default=None,
        description="PNG or, for a folder or archive, folder to write; reconstructions(.png) in the run folder if not "
        "given, or NAME-reconstructions(.png) for another model",
    )


def reconstruct(
    autoencoder: Autoencoder, paths: tuple[Path, ...], levels: bool = False, max_pixels: int = MAX_PIXELS
) -> UInt8[Tensor, "b n c h w"]:
    """Return, for each image, the original and the reconstruction.

    With `levels`, reconstructions from the coarsest level alone, then from the two coarsest, … are between them.
    """
    size, channels = autoencoder.size, autoencoder.image_channels
    images = torch.stack([hwc_to_chw(read_image(path, size, channels, max_pixels=max_pixels)) for path in paths])
    codes = autoencoder.encode(to_float(images))
    shown = progressive_levels(autoencoder) if levels else [None]
    return torch.stack([images, *(to_uint8(autoencoder.decode(codes, names)) for names in shown)], 1)


def progressive_levels(autoencoder: Autoencoder) -> list[tuple[str, ...]]:
    """Return the names of the coarsest level, of the two coarsest, …, of all levels."""
    names = level_names(len(autoencoder.map_specs))
    return [names[index:] for index in reversed(range(len(names)))]


def reconstruct_all(autoencoder: Autoencoder, images: ImageDataset, out: Path) -> int:
    """Write the reconstruction of every readable image to a new folder, as NAME.png. Return their number.

    The folder is complete or absent.

    Raises:
        UserError: If the folder exists and is not empty, too many images are unreadable, or two have the same NAME.
    """
    check_new(out)
    device, count = next(autoencoder.parameters()).device, 0
    with files.atomic_write(out) as partial, tqdm(desc="reconstructions", total=len(images), unit="image") as bar:
        for start in range(0, len(images), _BATCH):
            numbers = range(start, min(start + _BATCH, len(images)))
            read = {number: sample.image for number in numbers if (sample := images.read(number))}
            if read:
                codes = autoencoder.encode(to_float(torch.stack(list(read.values())).to(device)))
                for number, image in zip(read, to_uint8(autoencoder.decode(codes)).cpu(), strict=True):
                    path = (partial / images.names[number]).with_suffix(".png")
                    if path.exists():
                        raise UserError(
                            f"{images.source.describe(number)}: another image has the same name without "
                            "its suffix. Rename one of them."
                        )
                    save_image(path, image)
                count += len(read)
            bar.update(len(numbers))
    return count


def _open_images(options: ReconstructOptions, autoencoder: Autoencoder) -> ImageDataset:
    config = DataConfig(
        path=str(options.images[0]),
        size=autoencoder.size,
        channels=cast(Any, autoencoder.image_channels),
        max_pixels=options.max_pixels,
    )
    source = open_source(config.path)
    return ImageDataset(config, source, np.arange(len(source.index)))


def main(options: ReconstructOptions) -> None:
    """Run the command `vqvae2 reconstruct`."""
    if len(options.images) == 1 and not is_image(str(options.images[0])):
        if options.levels:
            raise UserError("--levels: needs image files. Name the files instead of a folder or archive.")
        autoencoder = Autoencoder.from_pretrained(options.run, processes().device or "cpu")
        out = options.out or default_output(options.run, "reconstructions")
        print(f"{out}: {reconstruct_all(autoencoder, _open_images(options, autoencoder), out):,} images")
        return
    autoencoder = Autoencoder.from_pretrained(options.run)
    rows = reconstruct(autoencoder, options.images, options.levels, options.max_pixels)
    out = options.out or default_output(options.run, "reconstructions.png")
    save_grid(out, rows.flatten(0, 1), columns=rows.shape[1])
    columns = ["original", "reconstruction"]
    if options.levels:
        columns[1:] = [" + ".join(reversed(names)) for names in progressive_levels(autoencoder)]
    print(f"{out}\ncolumns: {', '.join(columns)}")

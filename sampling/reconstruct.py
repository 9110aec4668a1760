"""The command `vqvae2 reconstruct`: images beside their reconstructions, or a folder of reconstructions."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from sampling.output_folder import check_new, check_new_picture, default_output, next_new
from sampling.processes import processes
from vqvae2 import files
from vqvae2.command_line import Options
from vqvae2.data.image_io import MAX_PIXELS
from vqvae2.data.images import DataConfig, ImageDataset, read_images, to_float, to_uint8
from vqvae2.data.sources import open_source
from vqvae2.data.sources.base import is_image, member_name
from vqvae2.errors import UserError
from vqvae2.hub import SOURCE_HELP
from vqvae2.models import Autoencoder
from vqvae2.pictures import save_grid, save_image
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
        description="new PNG or, for a folder or archive, new folder; if not given, reconstructions(.png) in the run "
        "folder, or NAME-reconstructions(.png) for another model, and reconstructions-2(.png), … if it exists",
    )


def reconstruct(
    autoencoder: Autoencoder, paths: tuple[Path, ...], levels: bool = False, max_pixels: int = MAX_PIXELS
) -> UInt8[Tensor, "b n c h w"]:
    """Return, for each image, the original and the reconstruction.

    With `levels`, reconstructions from the coarsest level alone, then from the two coarsest, … are between them.
    """
    size, channels = autoencoder.size, autoencoder.image_channels
    images = read_images(paths, size, channels, max_pixels)
    codes = autoencoder.encode(to_float(images))
    shown = progressive_levels(autoencoder) if levels else [None]
    return torch.stack([images, *(to_uint8(autoencoder.decode(codes, names)) for names in shown)], 1)


def progressive_levels(autoencoder: Autoencoder) -> list[tuple[str, ...]]:
    """Return the names of the coarsest level, of the two coarsest, …, of all levels."""
    names = level_names(len(autoencoder.map_specs))
    return [names[index:] for index in reversed(range(len(names)))]


def reconstruct_all(autoencoder: Autoencoder, images: ImageDataset, out: Path) -> int:
    """Write the reconstruction of every readable image to a new folder, as NAME.png. Return their number.

    NAME is the path in the source, without a leading `/` and without `..`. The folder is complete or absent.

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
                    path = _png_path(partial, images.names[number])
                    if path.exists():
                        raise UserError(
                            f"{images.source.describe(number)}: the reconstruction of another image is also named "
                            f"{path.relative_to(partial)}. Rename one of them."
                        )
                    save_image(path, image)
                count += len(read)
            bar.update(len(numbers))
    return count


def _png_path(folder: Path, name: str) -> Path:
    """Return the path in a folder for the reconstruction of an image, whose name can be absolute or contain `..`."""
    path = (folder / (member_name(name) or "image")).with_suffix(".png")
    assert path.is_relative_to(folder)
    return path


def _open_images(options: ReconstructOptions, autoencoder: Autoencoder) -> ImageDataset:
    config = DataConfig.from_dict(
        {
            "path": str(options.images[0]),
            "size": autoencoder.size,
            "channels": autoencoder.image_channels,
            "max_pixels": options.max_pixels,
        },
        "vqvae2 reconstruct",
    )
    source = open_source(config.path)
    return ImageDataset(config, source, np.arange(len(source.index)))


def main(options: ReconstructOptions) -> None:
    """Run the command `vqvae2 reconstruct`."""
    if len(options.images) == 1 and not is_image(str(options.images[0])):
        if options.levels:
            raise UserError("--levels: needs image files. Name the files instead of a folder or archive.")
        autoencoder = Autoencoder.from_pretrained(options.run, processes().device or "cpu")
        out = options.out or next_new(default_output(options.run, "reconstructions"))
        print(f"{out}: {reconstruct_all(autoencoder, _open_images(options, autoencoder), out):,} images")
        return
    out = options.out or next_new(default_output(options.run, "reconstructions.png"), ".png")
    check_new_picture(out)
    autoencoder = Autoencoder.from_pretrained(options.run)
    rows = reconstruct(autoencoder, options.images, options.levels, options.max_pixels)
    save_grid(out, rows.flatten(0, 1), columns=rows.shape[1])
    columns = ["original", "reconstruction"]
    if options.levels:
        columns[1:] = [" + ".join(reversed(names)) for names in progressive_levels(autoencoder)]
    print(f"{out}\ncolumns: {', '.join(columns)}")

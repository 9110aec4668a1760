"""The command `vqvae2 reconstruct`: images beside their reconstructions from all levels, and from the coarser ones."""

from pathlib import Path

import torch
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor
from tyro.conf import Positional

from sampling.output_folder import default_output
from vqvae2.command_line import Options
from vqvae2.data.image_io import MAX_PIXELS
from vqvae2.data.images import read_image, to_float, to_uint8
from vqvae2.hub import SOURCE_HELP
from vqvae2.models import Autoencoder
from vqvae2.pictures import hwc_to_chw, save_grid
from vqvae2.run_folder import level_names


class ReconstructOptions(Options):
    """Encode and decode images, and write the originals beside their reconstructions."""

    run: Positional[Path] = Field(description=SOURCE_HELP)
    images: Positional[tuple[Path, ...]] = Field(min_length=1, description="image files")
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
        default=None, description="PNG to write; reconstructions.png in the run folder if not given"
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


def main(options: ReconstructOptions) -> None:
    """Run the command `vqvae2 reconstruct`."""
    autoencoder = Autoencoder.from_pretrained(options.run)
    rows = reconstruct(autoencoder, options.images, options.levels, options.max_pixels)
    out = options.out or default_output(options.run, "reconstructions.png")
    save_grid(out, rows.flatten(0, 1), columns=rows.shape[1])
    columns = ["original", "reconstruction"]
    if options.levels:
        columns[1:] = [" + ".join(reversed(names)) for names in progressive_levels(autoencoder)]
    print(f"{out}\ncolumns: {', '.join(columns)}")

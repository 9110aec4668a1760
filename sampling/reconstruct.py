"""The command `vqvae2 reconstruct`: images beside their reconstructions, and what each level alone carries."""

from pathlib import Path

import torch
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor
from tyro.conf import Positional

from vqvae2.command_line import Options
from vqvae2.data.image_io import MAX_PIXELS
from vqvae2.data.images import read_image, to_float, to_uint8
from vqvae2.models import Autoencoder
from vqvae2.pictures import hwc_to_chw, save_grid
from vqvae2.run_folder import RunFolder, level_names


class ReconstructOptions(Options):
    """Encode and decode images, and write the originals beside their reconstructions."""

    run: Positional[Path] = Field(description="run folder")
    images: Positional[tuple[Path, ...]] = Field(min_length=1, description="image files")
    levels: bool = Field(default=False, description="also show what each level alone carries")
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=2**31,
        description="images with more pixels are unreadable, because of their memory",
    )
    out: Path | None = Field(default=None, description="PNG to write; RUN/reconstructions.png if not given")


def reconstruct(
    autoencoder: Autoencoder, paths: tuple[Path, ...], levels: bool = False, max_pixels: int = MAX_PIXELS
) -> UInt8[Tensor, "b n c h w"]:
    """Return, for each image, the original, the reconstruction and, with `levels`, each level alone, finest first."""
    size, channels = autoencoder.size, autoencoder.image_channels
    images = torch.stack([hwc_to_chw(read_image(path, size, channels, max_pixels=max_pixels)) for path in paths])
    codes = autoencoder.encode(to_float(images))
    columns = [images, to_uint8(autoencoder.decode(codes))]
    if levels:
        for index in range(len(codes)):
            only = tuple(level == index for level in range(len(codes)))
            columns.append(to_uint8(autoencoder.decode(codes, only=only)))
    return torch.stack(columns, 1)


def main(options: ReconstructOptions) -> None:
    """Run the command `vqvae2 reconstruct`."""
    folder = RunFolder.existing(options.run)
    autoencoder = Autoencoder.load(folder.autoencoder_weights)
    rows = reconstruct(autoencoder, options.images, options.levels, options.max_pixels)
    out = options.out or folder.reconstructions
    save_grid(out, rows.flatten(0, 1), columns=rows.shape[1])
    names = ["original", "reconstruction"]
    if options.levels:
        names += [f"{name} alone" for name in level_names(len(autoencoder.map_specs))]
    print(f"{out}\ncolumns: {', '.join(names)}")

"""The command `vqvae2 reconstruct`: images beside what their codes bring back, and what each level alone carries."""

import argparse
from pathlib import Path

import torch

from vqvae2.data.images import read_image, to_float, to_uint8
from vqvae2.models import Autoencoder
from vqvae2.pictures import hwc_to_chw, save_grid
from vqvae2.run_folder import RunFolder, level_names


def reconstruct(autoencoder: Autoencoder, paths: list[Path], levels: bool = False) -> torch.Tensor:
    """Rows of uint8 images: original, reconstruction and, with `levels`, each level on its own, finest first."""
    size, channels = autoencoder.size, autoencoder.image_channels
    images = torch.stack([hwc_to_chw(read_image(path, size, channels)) for path in paths])
    codes = autoencoder.encode(to_float(images))
    columns = [images, to_uint8(autoencoder.decode(codes))]
    if levels:
        for index in range(len(codes)):
            only = tuple(level == index for level in range(len(codes)))
            columns.append(to_uint8(autoencoder.decode(codes, only=only)))
    return torch.stack(columns, 1)


def main(arguments: list[str]) -> None:
    """The command `vqvae2 reconstruct`."""
    parser = argparse.ArgumentParser(prog="vqvae2 reconstruct", description="Write images beside reconstructions.")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    parser.add_argument("--levels", action="store_true", help="show what each level alone carries, too")
    parser.add_argument("--out", type=Path, help="PNG to write; RUN/reconstructions.png by default")
    options = parser.parse_args(arguments)
    folder = RunFolder.existing(options.run)
    autoencoder = Autoencoder.load(folder.autoencoder_weights)
    rows = reconstruct(autoencoder, options.images, options.levels)
    out = options.out or folder.path / "reconstructions.png"
    save_grid(out, rows.flatten(0, 1), columns=rows.shape[1])
    names = ["original", "reconstruction"]
    if options.levels:
        names += [f"{name} alone" for name in level_names(len(autoencoder.map_specs))]
    print(f"{out}\ncolumns: {', '.join(names)}")

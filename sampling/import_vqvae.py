"""The command `vqvae2 import-vqvae`: a checkpoint of the widely used PyTorch VQ-VAE-2 as our weights file."""

import argparse
from pathlib import Path

from vqvae2.models.importing import import_autoencoder


def main(arguments: list[str]) -> None:
    """The command `vqvae2 import-vqvae`."""
    parser = argparse.ArgumentParser(prog="vqvae2 import-vqvae", description=__doc__)
    parser.add_argument("file", type=Path, help="its .pt file")
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("H", "W"), help="of the images")
    options = parser.parse_args(arguments)
    height, width = options.size
    model = import_autoencoder(options.file, (height, width))
    model.save(options.out, imported_from=options.file.name)
    print(options.out)

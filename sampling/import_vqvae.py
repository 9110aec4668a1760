"""The command `vqvae2 import-vqvae`: convert a checkpoint of rosinality/vq-vae-2-pytorch to a weights file."""

from pathlib import Path

from pydantic import Field
from tyro.conf import Positional

from sampling.output_folder import check_new_file
from vqvae2.command_line import Options
from vqvae2.models.importing import import_autoencoder


class ImportOptions(Options):
    """Convert an autoencoder checkpoint of rosinality/vq-vae-2-pytorch to a safetensors file of this project."""

    file: Positional[Path] = Field(description="the .pt file")
    out: Positional[Path] = Field(description="the new .safetensors file to write")
    size: tuple[int, int] = Field(default=(256, 256), description="height and width of the images, in pixels")


def main(options: ImportOptions) -> None:
    """Run the command `vqvae2 import-vqvae`."""
    check_new_file(options.out)
    model = import_autoencoder(options.file, options.size)
    model.save(options.out, imported_from=options.file.name)
    print(options.out)

"""Write docs/hero.png from a finished run: originals, top level only, all levels, and samples.

python docs/make_hero.py runs/demo     # from the project's folder
"""

import sys
from pathlib import Path

import torch

from sampling import VQVAE2Pipeline
from sampling.run_config import RunConfig
from vqvae2.data.images import to_float, to_uint8
from vqvae2.data.splits import open_datasets
from vqvae2.pictures import save_rows
from vqvae2.run_folder import RunFolder

_IMAGES = 10  # one held-out image and one sample per class


def main(run: Path) -> None:
    """Draw one row per kind of image."""
    folder = RunFolder.existing(run)
    pipeline = VQVAE2Pipeline.from_pretrained(run)
    config = RunConfig.from_resolved_yaml(folder.config)
    _, held_out = open_datasets(config.data, folder.data_index)
    by_label = {held_out.label(index): index for index in reversed(range(len(held_out)))}
    indices = [by_label[label] for label in sorted(by_label)][:_IMAGES]
    originals = torch.stack([held_out[index].image for index in indices])
    codes = pipeline.autoencoder.encode(to_float(originals))
    rows = {
        "original": originals,
        "top level only": to_uint8(pipeline.autoencoder.decode(codes, ["top"])),
        "all levels": to_uint8(pipeline.autoencoder.decode(codes)),
        "samples": to_uint8(pipeline(num_images=len(indices), seed=0, temperature=config.sampling.temperature)),
    }
    path = Path(__file__).with_name("hero.png")
    save_rows(path, rows)
    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

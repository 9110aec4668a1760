"""Measure whether variations keep the composition of an image and change its detail.

    python -m benchmarks.variations RUN [--images 64]

Held-out images are varied once with the codes of their coarsest level kept. Composition is compared by averages over an
8×8 grid: the root-mean-square distance between an image and its variation, relative to the distance between two images.
Detail is what remains after the averages are subtracted; its distance is relative to the same of two images.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sampling import VQVAE2Pipeline
from sampling.editing import variations
from sampling.run_config import RunConfig
from sampling.run_data import open_run_datasets
from vqvae2.data.images import to_float
from vqvae2.run_folder import RunFolder

_GRID = 8  # averages per side


def composition(images: Tensor) -> Tensor:
    """Return averages (B, C, 8, 8) of images (B, C, H, W)."""
    return F.adaptive_avg_pool2d(images, _GRID)


def detail(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) without their averages."""
    return images - F.interpolate(composition(images), size=images.shape[2:], mode="bilinear")


def distance(first: Tensor, second: Tensor) -> float:
    """Return the root-mean-square distance of two batches in units of 8-bit levels."""
    return float((first - second).square().mean().sqrt()) * 127.5


@torch.inference_mode()
def main() -> None:
    """Print both distances, and their ratios to those of two images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=64)
    options = parser.parse_args()
    folder = RunFolder.existing(options.run)
    _, held_out = open_run_datasets(RunConfig.from_resolved_yaml(folder.config).data, folder)
    count = min(options.images, len(held_out))
    images = to_float(torch.stack([held_out[index].image for index in range(count)]))
    pipeline = VQVAE2Pipeline.from_pretrained(options.run)
    labels = [held_out.label(index) for index in range(count)] if pipeline.class_names else None
    varied = variations(pipeline, images, class_labels=labels, variants=1)[:, 0]
    other = images.roll(1, 0)
    for name, part in (("composition", composition), ("detail", detail)):
        kept, between = distance(part(images), part(varied)), distance(part(images), part(other))
        print(f"{name}: image and variation {kept:.1f}, two images {between:.1f}, ratio {kept / between:.2f}")


if __name__ == "__main__":
    main()

"""Pictures for people: grids of images and curves."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from vqvae2 import files


def to_picture(image: UInt8[Tensor, "c h w"]) -> Image.Image:
    """A Pillow image of one, three or four channels."""
    array = image.movedim(0, -1).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def save_png(path: Path, image: UInt8[Tensor, "c h w"]) -> None:
    """Write one image, atomically."""
    with files.atomic(path) as partial:
        to_picture(image).save(partial, format="PNG")


def read_png(path: Path) -> UInt8[Tensor, "c h w"]:
    """What `save_png` wrote."""
    with Image.open(path) as image:
        array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).movedim(-1, 0)


def save_grid(path: Path, images: UInt8[Tensor, "b c h w"], columns: int, enlarge_to: int = 96) -> None:
    """Write images as one PNG, row by row; small ones are enlarged pixel by pixel to about `enlarge_to`."""
    factor = max(1, round(enlarge_to / max(images.shape[2:])))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    save_png(path, make_grid(images, nrow=columns, padding=2, pad_value=255))


def side_by_side(*rows: UInt8[Tensor, "b c h w"], columns: int) -> tuple[Tensor, int]:
    """Groups of images, each kind under the one before it, `columns` across; what `save_grid` takes."""
    columns = min(columns, len(rows[0]))
    usable = len(rows[0]) // columns * columns
    blocks = torch.stack([row[:usable].unflatten(0, (-1, columns)) for row in rows], 1)
    return blocks.flatten(0, 2), columns


def save_curves(path: Path, curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], title: str) -> None:
    """Write one panel for each entry: a name, and lines by name as (step, value) points."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure  # slow to import, and needed by few commands

    figure = Figure(figsize=(5 * len(curves), 3.6), layout="constrained")
    figure.suptitle(title)
    for axes, (name, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for label, points in lines.items():
            if points:
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with files.atomic(path) as partial:
        figure.savefig(partial, format="png", dpi=110)

"""What is kept of an image in editing: the part that a mask covers, or its coarsest levels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from PIL import ExifTags, Image
from torch import Tensor

from sampling.sample_level import PartialCodes
from vqvae2.code_maps import CodeMaps, MapSpec
from vqvae2.data.image_io import read_image
from vqvae2.errors import UserError

HALVES = ("top-half", "bottom-half", "left-half", "right-half")


def read_mask(source: str, size: tuple[int, int], photographs: Sequence[Path] = ()) -> Bool[Tensor, "h w"]:
    """Return a mask that is true for pixels to keep.

    Args:
        source: One of `HALVES`, or the path of a picture whose white and opaque pixels are kept.
        size: Height and width of the mask, those of the model's images.
        photographs: Files of the edited images. A picture of their size is resized and cropped as they are.

    Raises:
        UserError: If the file is missing, unreadable, of another size, or leaves nothing to sample.
    """
    mask = torch.zeros(size, dtype=torch.bool)
    height, width = size
    if source in HALVES:
        side = source.partition("-")[0]
        rows = {"top": slice(0, height // 2), "bottom": slice(height - height // 2, None)}
        columns = {"left": slice(0, width // 2), "right": slice(width - width // 2, None)}
        mask[rows.get(side, slice(None)), columns.get(side, slice(None))] = True
        return mask
    if not Path(source).is_file():
        raise UserError(f"--keep {source}: no such file. Give {', '.join(HALVES)}, or a picture whose white is kept.")
    pixels = read_image(Path(source), size, channels=4, name=f"--keep {source}")
    found = _upright_size(Path(source))
    if found != size and {found} != {_upright_size(path) for path in photographs}:
        raise UserError(
            f"--keep {source}: the mask is {found[0]} × {found[1]} pixels. Give one of the size of the photographs, or "
            f"of {height} × {width} pixels, the size of the model's images."
        )
    brightness = np.array(Image.fromarray(pixels).convert("L"))
    mask = torch.from_numpy((brightness >= 128) & (pixels[..., 3] >= 128))
    if mask.all():
        raise UserError(f"--keep {source}: the mask is all white, so nothing is left to sample. Paint that part black.")
    return mask


def _upright_size(path: Path) -> tuple[int, int]:
    """Return the height and width of a readable picture, as they are after rotation by the EXIF orientation."""
    with Image.open(path) as picture:
        width, height = picture.size
        return (width, height) if picture.getexif().get(ExifTags.Base.Orientation, 1) > 4 else (height, width)


def keep_masked(codes: CodeMaps, mask: Bool[Tensor, "..."], maps: Sequence[MapSpec]) -> tuple[PartialCodes, ...]:
    """Keep, on each level, the codes all of whose pixels a mask (H, W) or (B, H, W) covers."""
    mask = mask.expand(len(codes[0]), *mask.shape[-2:])
    partial = []
    for level, spec in zip(codes, maps, strict=True):
        rows, columns = mask.shape[1] // spec.height, mask.shape[2] // spec.width
        cells = mask.unflatten(2, (spec.width, columns)).unflatten(1, (spec.height, rows))
        partial.append(PartialCodes(level, cells.all(4).all(2).to(level.device)))
    return tuple(partial)


def keep_coarsest(codes: CodeMaps, count: int) -> tuple[PartialCodes, ...]:
    """Keep all codes of the `count` coarsest levels, and none of the finer levels.

    Raises:
        UserError: If no level would be kept, or none left to sample.
    """
    if len(codes) == 1:
        raise UserError("keep_levels: this model has one level, so nothing would be left to sample")
    if not 1 <= count < len(codes):
        allowed = "1" if len(codes) == 2 else f"between 1 and {len(codes) - 1}"
        raise UserError(f"keep_levels: must be {allowed} for a model of {len(codes)} levels, not {count}")
    finer = len(codes) - count
    return tuple(
        PartialCodes(level, torch.full_like(level, index >= finer).bool()) for index, level in enumerate(codes)
    )

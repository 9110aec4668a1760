"""Image grids and curves as PNG files, and animations."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid

from vqvae2 import files
from vqvae2.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_MARKERS = 10  # points of a curve that are marked
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # of Pillow, for a damaged file
_BORDER = 2  # pixels around each image of a grid
_CAPTION = 14  # font size of captions in pixels


def to_pil(image: UInt8[Tensor, "c h w"]) -> Image.Image:
    """Return a PIL image of mode L, RGB or RGBA."""
    array = image.movedim(0, -1).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def save_image(path: Path, image: UInt8[Tensor, "c h w"]) -> None:
    """Write one image as a PNG, or as a lossless WebP if that is the suffix of `path`, atomically."""
    with files.atomic_write(path) as partial:
        if path.suffix == ".webp":
            to_pil(image).save(partial, format="WEBP", lossless=True, exact=True)  # exact: colors of transparent pixels
        else:
            to_pil(image).save(partial, format="PNG")


def hwc_to_chw(pixels: UInt8[np.ndarray, "*n h w c"]) -> UInt8[Tensor, "*n c h w"]:
    """Return pixels (..., H, W, C) as a contiguous tensor (..., C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -3)))


def load_image(path: Path) -> UInt8[Tensor, "c h w"]:
    """Return an image that `save_image` wrote. A grayscale WebP has three channels.

    Raises:
        UserError: If it is not a readable image.
    """
    try:
        with Image.open(path) as image:
            array = np.array(image)
    except IMAGE_ERRORS as error:
        raise UserError(f"{path}: not a readable image ({error}). Delete it and run the same command again.") from None
    return hwc_to_chw(array.reshape(*array.shape[:2], -1))


def save_grid(path: Path, images: UInt8[Tensor, "b c h w"], columns: int, enlarge_to: int = 96) -> None:
    """Write a PNG of images in rows. Small images are enlarged by pixel repetition to about `enlarge_to` pixels."""
    save_image(path, image_grid(images, columns, enlarge_to))


def image_grid(images: UInt8[Tensor, "b c h w"], columns: int, enlarge_to: int = 96) -> UInt8[Tensor, "_ h2 w2"]:
    """Return one image of images in rows, with borders; gray images as RGB. See `save_grid`."""
    return make_grid(enlarge(images, enlarge_to), nrow=columns, padding=_BORDER, pad_value=255)


def save_rows(path: Path, rows: Mapping[str, UInt8[Tensor, "n c h w"]], enlarge_to: int = 96) -> None:
    """Write a PNG with one row of images per caption, and the captions on the left. Rows may differ in length."""
    longest = max(len(images) for images in rows.values())
    filled = [
        F.pad(images, (0, 0, 0, 0, 0, 0, 0, longest - len(images)), value=255)  # white images
        for images in rows.values()
    ]
    images = enlarge(torch.cat(filled), enlarge_to)
    grid = to_pil(make_grid(images, nrow=longest, padding=_BORDER, pad_value=255))
    import matplotlib as mpl  # slow to import

    # Pillow's own font has no accents.
    font = ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _CAPTION)
    captions = [name.encode("utf-8", "replace").decode("utf-8") for name in rows]
    margin = _CAPTION + int(max(font.getlength(name) for name in captions))
    canvas = Image.new(grid.mode, (margin + grid.width, grid.height), (255,) * len(grid.getbands()))
    canvas.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(canvas)
    step = images.shape[2] + _BORDER
    ink = (0, 0, 0, 255)[: len(grid.getbands())]
    for row, name in enumerate(captions):
        draw.text((_CAPTION // 2, _BORDER + row * step + step // 2), name, ink, font, anchor="lm")
    with files.atomic_write(path) as partial:
        canvas.save(partial, format="PNG")


def save_animation(path: Path, frames: Sequence[UInt8[Tensor, "c h w"]], seconds: float = 0.2) -> None:
    """Write a GIF that shows each frame for some time, and repeats forever."""
    first, *others = map(to_pil, frames)
    with files.atomic_write(path) as partial:
        first.save(partial, format="GIF", save_all=True, append_images=others, duration=round(1000 * seconds), loop=0)


def save_clips(folder: Path, name: str, clips: Mapping[str, UInt8[Tensor, "t c h w"]], context_frames: int) -> None:
    """Write captioned clips as rows of NAME.png, and side by side as NAME.gif.

    In the PNG, a white gap separates the first `context_frames` frames from the others.
    """
    gap = torch.full_like(next(iter(clips.values()))[:1], 255)
    rows = {caption: torch.cat([clip[:context_frames], gap, clip[context_frames:]]) for caption, clip in clips.items()}
    save_rows(folder / f"{name}.png", rows, enlarge_to=64)
    frames = torch.stack(list(clips.values()), 1)
    save_animation(folder / f"{name}.gif", [image_grid(each, len(clips), enlarge_to=128) for each in frames])


def interleave_rows(*rows: UInt8[Tensor, "b c h w"], columns: int) -> tuple[Tensor, int]:
    """Interleave equally long batches so that a grid shows corresponding images below each other.

    Returns the images, and the number of columns for `save_grid`: at most `columns`. Images that do not fill a whole
    row of the grid are dropped.
    """
    columns = min(columns, len(rows[0]))
    usable = len(rows[0]) // columns * columns
    blocks = torch.stack([row[:usable].unflatten(0, (-1, columns)) for row in rows], 1)
    return blocks.flatten(0, 2), columns


def enlarge(images: UInt8[Tensor, "b c h w"], enlarge_to: int) -> UInt8[Tensor, "b c h2 w2"]:
    """Return images enlarged by pixel repetition, by the factor that brings the longer side closest to `enlarge_to`."""
    factor = max(1, round(enlarge_to / max(images.shape[2:])))
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def make_figure(panels: int) -> "Figure":
    """Return an empty figure that is wide enough for panels side by side.

    Raises:
        UserError: If the environment selects a backend that matplotlib does not have.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        from matplotlib.figure import Figure  # slow to import, used by few commands
    except ValueError:
        value = os.environ["MPLBACKEND"]
        raise UserError(f"MPLBACKEND={value}: not a backend of matplotlib. Unset the variable.") from None
    return Figure(figsize=(5 * panels, 3.6), layout="constrained")


def save_curves(path: Path, curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], title: str) -> None:
    """Write a PNG with one panel per entry of `curves`: panel title → line label → (step, value) points."""
    figure = make_figure(len(curves))
    figure.suptitle(title)
    for axes, (name, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for label, points in lines.items():
            if points:
                marker = "o" if len(points) <= _MAX_MARKERS else ""  # a line through one point is invisible
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, marker=marker, markersize=3)
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    save_figure(path, figure)


def save_figure(path: Path, figure: "Figure", dpi: int = 110) -> None:
    """Write a figure as a PNG, atomically."""
    with files.atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi)

"""One image file to pixels: the only decoder and the only image transform, whatever the pixels came from.

Every kind of picture has a defined way to 8 bits a channel:
- EXIF orientation is applied, colour profiles are ignored, CMYK is converted by the plain formula;
- 16-bit grey and RGB are scaled to 8 bits, never clipped; floating-point and wider pixels are unreadable;
- transparency, of a palette too, is kept with four channels and laid over white with one or three;
- of an animation or several pages, the first counts;
- a picture of more pixels than `PIL.Image.MAX_IMAGE_PIXELS` is unreadable: it may be a decompression bomb.
"""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from vqvae2.errors import UserError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_BACKGROUND = (255, 255, 255, 255)  # what shows through transparent pixels
# How much larger than wanted a JPEG is decoded at least: against the full scale this changes photographs by 46 dB PSNR.
_OVERSIZE = 1.5
_LONG = 4  # times the area that is wanted: a picture that would cover more is cropped while it is resized
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# What Pillow's decoders raise for damaged files; the last ones only for the oddest.
_DAMAGE = (*_BOMB, OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError, TypeError)


class UnreadableImageError(UserError):
    """A file that should be an image and is none; `reason` says why."""

    def __init__(self, name: object, reason: object) -> None:
        super().__init__(f"{name}: cannot be read as an image ({reason}); remove or replace it")
        self.name, self.reason = str(name), " ".join(str(reason).split())

    def __reduce__(self) -> tuple[type["UnreadableImageError"], tuple[str, str]]:
        return type(self), (self.name, self.reason)


def read_image(
    file: Path | bytes | Image.Image,
    size: tuple[int, int],
    channels: int = 3,
    crop_position: tuple[float, float] = (0.5, 0.5),
    name: object = None,
) -> UInt8[np.ndarray, "h w c"]:
    """Decode an image, upright, and resize it with antialiasing so that it just covers `size`; crop what juts out.

    `crop_position` places the crop from (0, 0), left and top, to (1, 1), right and bottom. JPEGs are decoded at a reduced scale
    where that is still `_OVERSIZE` times the size. Raises `UnreadableImageError` with the `name` (the path) where the file is no
    image or is cut short.
    """
    picture = decode(file, size, channels, name)
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    pixels = np.array(picture, dtype=np.uint8) if scale == 1.0 else _resize(picture, size, scale, crop_position)
    spare = pixels.shape[0] - height, pixels.shape[1] - width
    upper, left = (int(extra * at + 0.5) for extra, at in zip(spare, crop_position[::-1], strict=True))
    return np.ascontiguousarray(pixels[upper : upper + height, left : left + width].reshape(height, width, channels))


def _resize(
    picture: Image.Image, size: tuple[int, int], scale: float, crop_position: tuple[float, float]
) -> UInt8[np.ndarray, "h w *c"]:
    """The picture `scale` times as large, by bicubic interpolation with antialiasing: all of it, or just what `crop_position`
    will leave of it."""
    height, width = max(round(picture.height * scale), size[0]), max(round(picture.width * scale), size[1])
    # Pillow weighs colours by their opacity, and need not make what a very long picture would be cropped to.
    if picture.mode == "RGBA" or height * width > _LONG * size[0] * size[1]:
        # Rounding may put a quotient above the side it comes from.
        across, down = min(size[1] / scale, picture.width), min(size[0] / scale, picture.height)
        left, upper = (picture.width - across) * crop_position[0], (picture.height - down) * crop_position[1]
        box = (left, upper, min(left + across, picture.width), min(upper + down, picture.height))
        return np.array(
            picture.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0), dtype=np.uint8
        )
    # The same filter in integers as Pillow's, equal to one level in 255, in half its time.
    channels = len(picture.getbands())
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8).reshape(picture.height, picture.width, channels))
    resized = F.interpolate(pixels.permute(2, 0, 1)[None], [height, width], mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def decode(file: Path | bytes | Image.Image, size: tuple[int, int], channels: int, name: object = None) -> Image.Image:
    """The whole picture, upright, in the mode of `channels`; JPEGs at a reduced scale that leaves enough."""
    name = name if name is not None else file if isinstance(file, Path) else "an image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata and the like: not worth a line for every epoch
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(file, Image.Image):
                return _convert(file, channels)
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                wanted = int(_OVERSIZE * max(size))
                image.draft(None, (wanted, wanted))  # before EXIF turns the picture
                return _convert(ImageOps.exif_transpose(image), channels)
    except _DAMAGE as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        reason: object = error
        if isinstance(error, UnidentifiedImageError):
            reason = "no image format is recognised in it"
        elif isinstance(error, _BOMB):
            reason = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, which may be a decompression bomb"
        raise UnreadableImageError(name, reason) from None


def _convert(image: Image.Image, channels: int) -> Image.Image:
    image = _eight_bits(image)
    if channels != 4 and image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, _BACKGROUND), picture)
    elif image.mode == MODES[channels]:
        image.load()
        return image
    return image.convert(MODES[channels])


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, which Pillow would clip; it scales 16-bit RGB itself."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image).astype(np.int64)
    if pixels.size and not 0 <= pixels.min() <= pixels.max() <= 65535:
        raise ValueError("pixels of more than 16 bits have no defined range")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))

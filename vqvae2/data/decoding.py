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
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from vqvae2.errors import UserError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_BACKGROUND = (255, 255, 255, 255)  # what shows through transparent pixels
# How much larger than wanted a JPEG is decoded at least: against the full scale this changes photographs by 46 dB PSNR.
_OVERSIZE = 1.5
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# What Pillow's decoders raise for damaged files; the last ones only for the oddest.
_DAMAGE = (*_BOMB, OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, LookupError, TypeError)


class Unreadable(UserError):
    """A file that should be an image and is none; `reason` says why."""

    def __init__(self, name: object, reason: object) -> None:
        super().__init__(f"{name}: cannot be read as an image ({reason}); remove or replace it")
        self.name, self.reason = str(name), " ".join(str(reason).split())

    def __reduce__(self) -> tuple[type["Unreadable"], tuple[str, str]]:
        return type(self), (self.name, self.reason)


def read_image(
    file: Path | bytes | Image.Image,
    size: tuple[int, int],
    channels: int = 3,
    where: tuple[float, float] = (0.5, 0.5),
    name: object = None,
) -> UInt8[np.ndarray, "h w c"]:
    """Decode an image, upright, and resize it with antialiasing so that it just covers `size`; crop what juts out.

    `where` places the crop from (0, 0), left and top, to (1, 1), right and bottom; it falls on whole pixels where
    nothing is resized. JPEGs are decoded at a reduced scale where that is still `_OVERSIZE` times the size. Raises
    `Unreadable` with the `name` (the path) where the file is no image or is cut short.
    """
    picture = decode(file, size, channels, name)
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    if scale == 1.0:
        spare = picture.width - width, picture.height - height
        left, upper = (int(pixels * at + 0.5) for pixels, at in zip(spare, where, strict=True))
        if picture.size != (width, height):
            picture = picture.crop((left, upper, left + width, upper + height))
    else:
        # Rounding may put a quotient above the side it comes from.
        across, down = min(width / scale, picture.width), min(height / scale, picture.height)
        left, upper = (picture.width - across) * where[0], (picture.height - down) * where[1]
        box = (left, upper, min(left + across, picture.width), min(upper + down, picture.height))
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.array(picture, dtype=np.uint8).reshape(height, width, channels)


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
        raise Unreadable(name, reason) from None


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

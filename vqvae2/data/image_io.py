"""Decoding and resizing of images. All sources use these functions.

Conversion to 8 bits per channel:
- EXIF orientation is applied. Color profiles are ignored. CMYK is converted with Pillow's formula.
- 16-bit grayscale and RGB are scaled to 8 bits. Floating-point and wider integer pixels are unreadable.
- Transparency is kept with four channels, and composited over white with one or three channels.
- Only the first frame or page is used.
- Images with more than `max_pixels` pixels are unreadable, as possible decompression bombs.
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
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from vqvae2.errors import UserError, printable

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_BACKGROUND = (255, 255, 255, 255)  # RGBA color behind transparent pixels
# JPEGs are decoded at a reduced scale that is at least this many times the target size. The result differs from
# full-scale decoding by 46 dB PSNR on photographs.
_MIN_JPEG_SCALE = 1.5
_MAX_RESIZED_AREA = 4  # multiple of the target area; larger results are cropped during resizing instead of after it
MAX_PIXELS = 2**28 // 3  # default of `max_pixels`; Pillow's limit
# Exceptions that Pillow's decoders raise for corrupted files.
_DECODE_ERRORS = (
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    LookupError,
    TypeError,
)


class UnreadableImageError(UserError):
    """A file that cannot be decoded as an image."""

    def __init__(self, name: object, reason: object) -> None:
        super().__init__(f"{name}: cannot be read as an image ({reason}). Remove or replace it.")
        self.name, self.reason = printable(str(name)), printable(" ".join(str(reason).split()))

    def __reduce__(self) -> tuple[type["UnreadableImageError"], tuple[str, str]]:
        return type(self), (self.name, self.reason)


# Pillow refuses a PNG with a text chunk above 1 MiB, such as large XMP metadata, although its pixels are intact.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def read_image(
    file: Path | bytes | Image.Image,
    size: tuple[int, int],
    channels: int = 3,
    crop_position: tuple[float, float] = (0.5, 0.5),
    name: object = None,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[np.ndarray, "h w c"]:
    """Decode an image, resize it with antialiasing to the smallest size that covers `size`, and crop it to `size`.

    `size` is (height, width). `crop_position` is the horizontal and vertical position of the crop, from (0, 0) for the
    top left to (1, 1) for the bottom right. `name` is used in errors, the path by default. A file with more than
    `max_pixels` pixels is unreadable.

    Raises:
        UnreadableImageError: If the file is not an image, or is truncated or corrupted.
    """
    image = decode_image(file, size, channels, name, max_pixels)
    height, width = size
    scale = max(height / image.height, width / image.width)
    pixels = np.array(image, dtype=np.uint8) if scale == 1.0 else _resize(image, size, scale, crop_position)
    spare = pixels.shape[0] - height, pixels.shape[1] - width
    top, left = (int(extra * share + 0.5) for extra, share in zip(spare, crop_position[::-1], strict=True))
    return np.ascontiguousarray(pixels[top : top + height, left : left + width].reshape(height, width, channels))


def _resize(
    image: Image.Image, size: tuple[int, int], scale: float, crop_position: tuple[float, float]
) -> UInt8[np.ndarray, "h w *c"]:
    """Resize by `scale` with antialiased bicubic interpolation: the whole image, or only the crop."""
    height, width = max(round(image.height * scale), size[0]), max(round(image.width * scale), size[1])
    # Pillow weights colors by alpha, and can resize only the crop of a very elongated image.
    if image.mode == "RGBA" or height * width > _MAX_RESIZED_AREA * size[0] * size[1]:
        # The quotients can exceed the sides by rounding.
        across, down = min(size[1] / scale, image.width), min(size[0] / scale, image.height)
        left, top = (image.width - across) * crop_position[0], (image.height - down) * crop_position[1]
        box = (left, top, min(left + across, image.width), min(top + down, image.height))
        return np.array(
            image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0), dtype=np.uint8
        )
    # The same filter as Pillow's in half the time. Results differ by at most one level of 255.
    channels = len(image.getbands())
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8).reshape(image.height, image.width, channels))
    resized = F.interpolate(pixels.permute(2, 0, 1)[None], [height, width], mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def decode_image(
    file: Path | bytes | Image.Image,
    size: tuple[int, int],
    channels: int,
    name: object = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decode a whole image, upright, in the mode of `channels`. JPEGs are decoded at a scale sufficient for `size`.

    Raises:
        UnreadableImageError: If the file is not an image, or is truncated or corrupted.
    """
    name = name if name is not None else file if isinstance(file, Path) else "an image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as corrupted metadata, which would be repeated in each epoch
            if isinstance(file, Image.Image):
                return _convert(file, channels)
            if Image.MAX_IMAGE_PIXELS is not None:
                Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
            with _open(file) as image:
                if image.width * image.height > max_pixels:
                    raise Image.DecompressionBombError
                wanted = int(_MIN_JPEG_SCALE * max(size))
                image.draft(None, (wanted, wanted))  # before the EXIF orientation is applied
                return _convert(ImageOps.exif_transpose(image), channels)
    except _DECODE_ERRORS as error:
        if isinstance(error, FileNotFoundError):
            raise
        reason: object = error
        if isinstance(error, UnidentifiedImageError):
            reason = "unknown image format"
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"more than data.max_pixels = {max_pixels:,} pixels, a possible decompression bomb"
        raise UnreadableImageError(name, reason) from None


def _open(file: Path | bytes) -> Image.Image:
    """Open an image file with Pillow, and an HEIC file with the plugin that Pillow needs for it."""
    try:
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    except UnidentifiedImageError:
        if not _is_heic(file):
            raise
    try:
        import pillow_heif  # an optional dependency  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("HEIC images need the package `pillow-heif`: pip install 'vqvae2[heic]'") from None
    pillow_heif.register_heif_opener()
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)


def _is_heic(file: Path | bytes) -> bool:
    if isinstance(file, Path):
        with file.open("rb") as opened:
            start = opened.read(12)
    else:
        start = file[:12]
    return start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def _convert(image: Image.Image, channels: int) -> Image.Image:
    image = _to_8bit(image)
    if channels != 4 and image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, _BACKGROUND), rgba)
    elif image.mode == MODES[channels]:
        image.load()
        return image
    return image.convert(MODES[channels])


def _to_8bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grayscale to 8 bits. Pillow would clip it. It scales 16-bit RGB on its own."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image).astype(np.int64)
    if pixels.size and not 0 <= pixels.min() <= pixels.max() <= 65535:
        raise ValueError("pixels of more than 16 bits have no defined range")
    return Image.fromarray(((pixels + 128) // 257).astype(np.uint8))

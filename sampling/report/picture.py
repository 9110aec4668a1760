"""Embed image files in the report as data URIs."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vqvae2.errors import UserError
from vqvae2.pictures import IMAGE_ERRORS

_COLUMN_WIDTH = 1042  # pixels of the page's text column; images up to this width are shown at their exact size
_MAX_WIDTH = 2112  # pixels; wider images are downscaled to limit the size of the page


@dataclass(frozen=True)
class Picture:
    """An image to embed; `uri` is empty if the file does not exist yet."""

    alt: str
    uri: str = ""  # data:image/png;base64,…
    width: int = 0
    height: int = 0
    pixelated: bool = False  # whether the browser should scale it without interpolation


def load_picture(path: Path | None, alt: str, pixelated: bool = True) -> Picture:
    """Load an image file, downscaled if it is very wide.

    Args:
        path: A PNG. If it is None or missing, the result has no URI.
        alt: Description of the image.
        pixelated: Whether to show pixels without interpolation, if the image fits into the page's column.

    Raises:
        UserError: If the file is not a readable image.
    """
    if path is None or not path.is_file():
        return Picture(alt)
    try:
        with Image.open(path) as image:
            width, height = image.size
            content = path.read_bytes()
            image.load()
            if width > _MAX_WIDTH:
                width, height = _MAX_WIDTH, round(height * _MAX_WIDTH / width)
                content = _resize(image, (width, height))
    except IMAGE_ERRORS as error:
        raise UserError(f"{path}: not a readable image ({error}). Delete the file and create it again.") from None
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return Picture(alt, uri, width, height, pixelated and width <= _COLUMN_WIDTH)


def _resize(image: Image.Image, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "PNG")
    return buffer.getvalue()

"""Uploaded images, and masks painted in the browser."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from vqvae2.data.image_io import read_image
from vqvae2.errors import UserError
from vqvae2.models import Autoencoder
from vqvae2.pictures import enlarge, hwc_to_chw, to_pil

_OPAQUE = 128  # lowest alpha value of a painted pixel


def read_upload(path: str | None, autoencoder: Autoencoder) -> UInt8[Tensor, "c h w"]:
    """Return an uploaded image, resized and cropped to the size of the model's images.

    Raises:
        UserError: If it is not an image, corrupted or too large, or if there is none.
    """
    if path is None:
        raise UserError("image: none was uploaded. Choose an image file.")
    pixels = read_image(Path(path), autoencoder.size, autoencoder.image_channels, name=Path(path).name)
    return hwc_to_chw(pixels)


def require_image(image: UInt8[Tensor, "c h w"] | None) -> UInt8[Tensor, "c h w"]:
    """Return the image of a tab.

    Raises:
        UserError: If there is none yet.
    """
    if image is None:
        raise UserError("image: none yet. Upload an image, or sample one.")
    return image


def editor_canvas(image: UInt8[Tensor, "c h w"], enlarge_to: int) -> dict[str, Any]:
    """Return the value of an image editor that shows an enlarged image with nothing painted on it."""
    background = to_pil(enlarge(image[None], enlarge_to)[0]).convert("RGBA")
    return {"background": background, "layers": [], "composite": background}


def painted_mask(editor: dict[str, Any] | None, size: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """Return the mask of painted pixels, at the size of the model's images, from the value of an image editor.

    A pixel counts as painted if any part of its enlargement is.

    Raises:
        UserError: If nothing is painted.
    """
    mask = torch.zeros(size, dtype=torch.bool)
    for layer in editor["layers"] if editor else []:
        alpha = np.asarray(layer)[..., 3] >= _OPAQUE
        shares = Image.fromarray(alpha.astype(np.uint8) * 255).resize((size[1], size[0]), Image.Resampling.BOX)
        mask |= torch.from_numpy(np.array(shares) > 0)
    if not mask.any():
        raise UserError("mask: nothing is painted. Paint the part of the image to redraw.")
    return mask

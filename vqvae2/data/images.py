"""Images as tensors: any source of pictures, split by a stable hash, through one transform.

Workers hand out uint8 (C, H, W), a quarter of the memory of floats; `to_float` makes them float32 in [-1, 1] on the
device.
"""

import logging
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from vqvae2.config import Config
from vqvae2.data.image_io import UnreadableImageError, read_image
from vqvae2.data.index import Integers, StringTable
from vqvae2.data.sources import open_source
from vqvae2.data.sources.base import Source
from vqvae2.errors import UserError
from vqvae2.pictures import hwc_to_chw

__all__ = ["DataConfig", "ImageDataset", "ImageSample", "open_datasets", "read_image", "to_float", "to_rgb", "to_uint8"]

_LISTED = 20  # unreadable images that an error names
_log = logging.getLogger(__name__)
_warned: dict[tuple[str, int, int], Tensor] = {}


class DataConfig(Config):
    """Where images come from and how they become tensors."""

    path: str = Field(
        default="scenes",
        description="a folder of images, a .zip or .tar of them, shards as `a{000..123}.tar`, a folder that `vqvae2 "
        "prepare` wrote, torchvision:NAME, huggingface:NAME, or `scenes`, the built-in data set",
    )
    size: int | tuple[int, int] = Field(default=256, description="side of a square, or height and width, in pixels")
    channels: Literal[1, 3, 4] = Field(default=3, description="1 grey, 3 RGB, 4 RGBA")
    labels: Literal["none", "folder"] = Field(
        default="none", description="`folder`: the first folder in a path is its class, or what the data set says"
    )
    val_fraction: float = Field(default=0.05, gt=0, lt=1, description="share of images that is held out")
    max_unreadable_fraction: float = Field(
        default=0.01, ge=0, lt=1, description="share of images that may be unreadable, and are skipped"
    )
    crop: Literal["center", "random"] = "center"
    flip: bool = Field(default=False, description="mirror half of the training images")
    num_scenes: int = Field(default=4096, ge=2, description="how many pictures `scenes` has")
    num_workers: int = Field(default=2, ge=0, description="processes that decode images; 0 decodes in the main one")

    @property
    def source(self) -> str:
        """The path as sources take it, with the number of built-in pictures."""
        return f"scenes:{self.num_scenes}" if self.path == "scenes" else self.path

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class ImageSample(NamedTuple):
    """One image as workers hand it out."""

    image: UInt8[Tensor, "c h w"]
    label: int  # −1 where there are no labels


class ImageDataset(Dataset[ImageSample]):
    """One split of a data set, in a stable order; `images[i]` is untouched, `images[i, draw]` is augmented by `draw`.

    `classes` are the names of the labels (empty without labels), `names` what tells the images apart.

    In the place of an unreadable image stands the next readable one, so what stands there depends on the number alone
    and training can be resumed; `read` says None instead. Each is named in one warning, whichever worker finds it, and
    `UserError` lists them when they are more than the share that `data.max_unreadable_fraction` allows.
    """

    def __init__(self, config: DataConfig, source: Source, chosen: Integers) -> None:
        self.config, self.source, self.chosen = config, source, chosen
        self.classes: tuple[str, ...] = source.index.classes if config.labels == "folder" else ()
        self._unreadable = _flags(len(chosen))
        # One command opens its images once for every stage, and is to name an unreadable one once.
        known = config.path, len(chosen), zlib.crc32(source.index.hashes[chosen].tobytes())
        self._warned = _warned.setdefault(known, _flags(len(chosen)))

    @property
    def names(self) -> StringTable:
        """What tells the images apart."""
        return self.source.index.names.take(self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: int | tuple[int, int]) -> ImageSample:
        index, draw = key if isinstance(key, tuple) else (key, None)
        for at in range(index, index + len(self)):
            item = self.read(at % len(self), draw)
            if item is not None:
                return item
        raise AssertionError("more unreadable images than any share allows")

    def read(self, index: int, draw: int | None = None) -> ImageSample | None:
        """As `images[index]` or `images[index, draw]`, but None for an unreadable image."""
        if self._unreadable[index]:
            return None
        number = int(self.chosen[index])
        try:
            file = self.source.open(number, self.config.shape)
            name = None if isinstance(file, Path) else self.source.describe(number)
            image = read_image(file, self.config.shape, self.config.channels, self._crop_position(draw), name)
        except UnreadableImageError as error:
            self.mark_unreadable(index, error)
            return None
        if draw is not None and self.config.flip and draw & 1:
            image = image[:, ::-1]
        return ImageSample(hwc_to_chw(image), self.label(index))

    def label(self, index: int) -> int:
        """The label of an image, −1 where there are none."""
        return int(self.source.index.labels[self.chosen[index]]) if self.classes else -1

    def digest(self) -> str:
        """SHA-256 of names and labels: what the images are, wherever they lie."""
        return self.source.index.digest(self.chosen)

    def check_unreadable_fraction(self, unreadable: Integers | list[int], reason: str = "") -> None:
        """UserError where these are more unreadable images than `data.max_unreadable_fraction` allows."""
        if len(unreadable) <= self.config.max_unreadable_fraction * len(self):
            return
        listed = ", ".join(self.source.describe(int(self.chosen[index])) for index in unreadable[:_LISTED])
        more = f" and {len(unreadable) - _LISTED} more" if len(unreadable) > _LISTED else ""
        raise UserError(
            f"data.path: {len(unreadable)} of {len(self)} images cannot be read as images, more than the share of "
            f"{self.config.max_unreadable_fraction:g} that data.max_unreadable_fraction allows: {listed}{more}{reason}; remove or replace "
            f"{'them' if len(unreadable) > 1 else 'it'}"
        )

    def mark_unreadable(self, index: int, error: UnreadableImageError) -> None:
        """Remember that an image is unreadable, and say so once; UserError where that makes too many."""
        self._unreadable[index] = 1
        if not self._warned[index]:
            self._warned[index] = 1
            _log.warning("vqvae2: warning: %s: cannot be read as an image (%s); skipped", error.name, error.reason)
        self.check_unreadable_fraction(torch.nonzero(self._unreadable).flatten().numpy(), f" ({error.reason})")

    def _crop_position(self, draw: int | None) -> tuple[float, float]:
        if draw is None or self.config.crop == "center":
            return 0.5, 0.5
        across, down = np.random.default_rng(draw).random(2)
        return float(across), float(down)


def open_datasets(config: DataConfig, cache: Path | None = None) -> tuple[ImageDataset, ImageDataset]:
    """The training and the validation split; UserError where there are no images.

    The index of a large source is kept in the file `cache`, where one is given, and used again while nothing changes.
    """
    source = open_source(config.source, cache)
    index = source.index
    if len(index) < 2:
        raise UserError(f"data.path: {config.path} holds one image; two are needed, one to train on, one held out")
    if config.labels == "folder" and (loose := np.flatnonzero(index.labels < 0)).size:
        name = source.describe(int(loose[0]))
        raise UserError(f"data.labels: `folder`, but {name} lies in no class folder; use `none`")
    training, held_out = index.split(config.val_fraction)
    return ImageDataset(config, source, training), ImageDataset(config, source, held_out)


def _flags(count: int) -> Tensor:
    """One flag an image, in memory that worker processes share."""
    return torch.zeros(count, dtype=torch.uint8).share_memory_()


def to_rgb(images: Shaped[Tensor, "b c h w"]) -> Shaped[Tensor, "b 3 h w"]:
    """Return grayscale images with the channel repeated, and RGBA images without alpha."""
    return images[:, :3].expand(-1, 3, -1, -1)


def to_float(images: UInt8[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
    """0 … 255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "*b c h w"]) -> UInt8[Tensor, "*b c h w"]:
    """[-1, 1] to 0 … 255, rounded, clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

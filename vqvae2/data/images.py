"""Image data sets: images of any source, split by a hash of their names, resized and cropped.

Samples are uint8 (C, H, W), a quarter of the memory of float32. `to_float` converts a batch to [-1, 1] on the device.
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

from vqvae2.code_maps import PositiveInt
from vqvae2.config import Config
from vqvae2.data.image_io import UnreadableImageError, read_image
from vqvae2.data.index import IntArray, StringTable
from vqvae2.data.sources import open_source
from vqvae2.data.sources.base import Source
from vqvae2.errors import UserError
from vqvae2.pictures import hwc_to_chw

__all__ = ["DataConfig", "ImageDataset", "ImageSample", "open_datasets", "read_image", "to_float", "to_rgb", "to_uint8"]

_MAX_LISTED = 20  # unreadable images listed in an error message
_log = logging.getLogger(__name__)
_warned: dict[tuple[str, int, int], Tensor] = {}


class DataConfig(Config):
    """Settings of the image data set."""

    path: str = Field(
        default="scenes",
        description="a folder of images, a .zip or .tar archive, shards such as `a{000..123}.tar`, a folder written by "
        "`vqvae2 prepare`, torchvision:NAME, huggingface:NAME, or `scenes`, the built-in data set",
    )
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        default=256, description="image size in pixels: side, or height and width"
    )
    channels: Literal[1, 3, 4] = Field(default=3, description="1 for grayscale, 3 for RGB, 4 for RGBA")
    labels: Literal["none", "folder"] = Field(
        default="none", description="`folder`: the first folder of an image's path, or the label of the data set"
    )
    val_fraction: float = Field(default=0.05, gt=0, lt=1, description="fraction of images held out for validation")
    max_unreadable_fraction: float = Field(
        default=0.01, ge=0, lt=1, description="fraction of images that may be unreadable and are skipped"
    )
    crop: Literal["center", "random"] = Field(default="center", description="crop of training images")
    flip: bool = Field(default=False, description="mirror half of the training images")
    num_scenes: int = Field(default=4096, ge=2, le=10**7, description="number of images of `scenes`")
    num_workers: int = Field(
        default=2, ge=0, le=1024, description="worker processes that decode images; 0 decodes in the main process"
    )

    @property
    def source(self) -> str:
        """The path in the form that `open_source` expects, with the number of built-in scenes."""
        return f"scenes:{self.num_scenes}" if self.path == "scenes" else self.path

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class ImageSample(NamedTuple):
    """An image and its label."""

    image: UInt8[Tensor, "c h w"]
    label: int  # −1 without labels


class ImageDataset(Dataset[ImageSample]):
    """One split of a data set, in a fixed order.

    `dataset[i]` is the center crop of image i. `dataset[i, seed]` is augmented with the random `seed`. `classes` are
    the class names, empty without labels.

    An unreadable image is replaced by the next readable one, so samples depend only on the index, and training can
    resume. `read` returns None instead. Each unreadable image is logged once over all workers.

    Raises:
        UserError: When more than `data.max_unreadable_fraction` of the images turn out to be unreadable.
    """

    def __init__(self, config: DataConfig, source: Source, indices: IntArray) -> None:
        self.config, self.source, self.indices = config, source, indices
        self.classes: tuple[str, ...] = source.index.classes if config.labels == "folder" else ()
        self._unreadable = _shared_flags(len(indices))
        # A command opens the images once per stage, but should warn only once about each.
        split_id = config.path, len(indices), zlib.crc32(source.index.hashes[indices].tobytes())
        self._warned = _warned.setdefault(split_id, _shared_flags(len(indices)))

    @property
    def names(self) -> StringTable:
        """Unique names of the images, usually their paths in the source."""
        return self.source.index.names.take(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, int]) -> ImageSample:
        index, seed = key if isinstance(key, tuple) else (key, None)
        for candidate in range(index, index + len(self)):
            sample = self.read(candidate % len(self), seed)
            if sample is not None:
                return sample
        raise AssertionError("unreachable: `read` raises before all images are unreadable")

    def read(self, index: int, seed: int | None = None) -> ImageSample | None:
        """Return the same as `dataset[index]` or `dataset[index, seed]`, but None for an unreadable image."""
        if self._unreadable[index]:
            return None
        number = int(self.indices[index])
        try:
            file = self.source.open(number, self.config.shape)
            name = None if isinstance(file, Path) else self.source.describe(number)
            image = read_image(file, self.config.shape, self.config.channels, self._crop_position(seed), name)
        except UnreadableImageError as error:
            self.mark_unreadable(index, error)
            return None
        if seed is not None and self.config.flip and seed & 1:
            image = image[:, ::-1]
        return ImageSample(hwc_to_chw(image), self.label(index))

    def label(self, index: int) -> int:
        """Return the label of an image, −1 without labels."""
        return int(self.source.index.labels[self.indices[index]]) if self.classes else -1

    def digest(self) -> str:
        """Return the SHA-256 of names and labels. It does not depend on where the images are stored."""
        return self.source.index.digest(self.indices)

    def check_unreadable_fraction(self, unreadable: IntArray | list[int], reason: str = "") -> None:
        """Check the number of unreadable images, given their indices.

        Raises:
            UserError: If it exceeds `data.max_unreadable_fraction`.
        """
        # Relative to the whole data set, because one file can be a large fraction of a small validation split.
        if len(unreadable) <= self.config.max_unreadable_fraction * len(self.source.index):
            return
        listed = ", ".join(self.source.describe(int(self.indices[index])) for index in unreadable[:_MAX_LISTED])
        more = f" and {len(unreadable) - _MAX_LISTED} more" if len(unreadable) > _MAX_LISTED else ""
        raise UserError(
            f"data.path: {len(unreadable)} of {len(self)} images cannot be read as images, more than "
            f"data.max_unreadable_fraction = {self.config.max_unreadable_fraction:g} allows: {listed}{more}{reason}. "
            f"Remove or replace {'them' if len(unreadable) > 1 else 'it'}."
        )

    def mark_unreadable(self, index: int, error: UnreadableImageError) -> None:
        """Mark an image as unreadable, with a warning the first time.

        Raises:
            UserError: If there are too many unreadable images.
        """
        self._unreadable[index] = 1
        if not self._warned[index]:
            self._warned[index] = 1
            _log.warning("vqvae2: warning: %s: cannot be read as an image (%s); skipped", error.name, error.reason)
        self.check_unreadable_fraction(torch.nonzero(self._unreadable).flatten().numpy(), f" ({error.reason})")

    def _crop_position(self, seed: int | None) -> tuple[float, float]:
        if seed is None or self.config.crop == "center":
            return 0.5, 0.5
        horizontal, vertical = np.random.default_rng(seed).random(2)
        return float(horizontal), float(vertical)


def open_datasets(config: DataConfig, cache: Path | None = None) -> tuple[ImageDataset, ImageDataset]:
    """Open the training and the validation split of a data set.

    `cache` is an optional file for the index of a large source. It is reused until the source changes.

    Raises:
        UserError: If the source cannot be read, has fewer than two images, or lacks the requested labels.
    """
    source = open_source(config.source, cache)
    index = source.index
    if len(index) < 2:
        raise UserError(f"data.path: only one image in {config.path}. Training and validation need at least one each.")
    if config.labels == "folder" and (unlabeled := np.flatnonzero(index.labels < 0)).size:
        name = source.describe(int(unlabeled[0]))
        raise UserError(f"data.labels: {name} is not in a class folder. Move it into one, or use `none`.")
    training, held_out = index.split(config.val_fraction)
    return ImageDataset(config, source, training), ImageDataset(config, source, held_out)


def _shared_flags(count: int) -> Tensor:
    """Return one flag per image in memory shared with worker processes."""
    return torch.zeros(count, dtype=torch.uint8).share_memory_()


def to_rgb(images: Shaped[Tensor, "b c h w"]) -> Shaped[Tensor, "b 3 h w"]:
    """Return grayscale images with the channel repeated, and RGBA images without alpha."""
    return images[:, :3].expand(-1, 3, -1, -1)


def to_float(images: UInt8[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
    """Convert uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "*b c h w"]) -> UInt8[Tensor, "*b c h w"]:
    """Convert images in [-1, 1] to uint8, with rounding and clipping."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

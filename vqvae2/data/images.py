"""Image data sets: images of any source, resized and cropped.

Samples are uint8 (C, H, W), a quarter of the memory of float32. `to_float` converts a batch to [-1, 1] on the device.
"""

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from pydantic import Field, field_validator
from torch import Tensor
from torch.utils.data import Dataset

from vqvae2.code_maps import PositiveInt
from vqvae2.config import Config
from vqvae2.data.image_io import MAX_PIXELS, UnreadableImageError, read_image
from vqvae2.data.index import IntArray, StringTable
from vqvae2.data.label_file import LabelFile
from vqvae2.data.samplers import shared_memory_error
from vqvae2.data.sources import absolute_source
from vqvae2.data.sources.base import Source
from vqvae2.errors import UserError, printable
from vqvae2.pictures import hwc_to_chw

__all__ = ["DataConfig", "ImageDataset", "ImageSample", "read_image", "to_float", "to_rgb", "to_uint8"]

_MAX_LISTED = 20  # unreadable images listed in an error message
_log = logging.getLogger(__name__)
_warned: dict[tuple[str, int, int], Tensor] = {}


class DataConfig(Config):
    """Settings of the image data set."""

    path: str = Field(
        default="scenes",
        description="a folder of images, a .txt file that lists images, a .zip or .tar archive, shards such as "
        "`a{000..123}.tar`, a folder written by `vqvae2 prepare`, torchvision:NAME, huggingface:NAME, videos:FOLDER, "
        "or the built-in data sets `scenes` and mazes:CLIPS",
    )
    val_path: str | None = Field(
        default=None,
        description="images for validation, in the same forms as `path`; a `val_fraction` of `path` if not given",
    )
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        default=256, description="image size in pixels: side, or height and width"
    )
    channels: Literal[1, 3, 4] = Field(default=3, description="1 for grayscale, 3 for RGB, 4 for RGBA")
    labels: str = Field(
        default="none",
        description="`none`; `folder`: the first folder of an image's path that does not contain all images, or the "
        "label of the data set; or a .csv, .tsv or .parquet file with the columns file_name and label, FILE:COLUMN for "
        "another column of labels",
    )
    val_fraction: float = Field(default=0.05, gt=0, lt=1, description="fraction of images held out for validation")
    split_by: Literal["image", "folder"] = Field(
        default="image",
        description="what `val_fraction` holds out: single images, or whole folders, such as the frames of a video",
    )
    max_unreadable_fraction: float = Field(
        default=0.01, ge=0, lt=1, description="fraction of the whole data set that may be unreadable and is skipped"
    )
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=2**31,
        description="images with more pixels are unreadable, because of their memory",
    )
    crop: Literal["center", "random"] = Field(default="center", description="crop of training images")
    flip: bool = Field(default=False, description="mirror half of the training images")
    num_scenes: int = Field(default=4096, ge=2, le=10**7, description="number of images of `scenes`")
    num_workers: int = Field(
        default=2, ge=0, le=1024, description="worker processes that decode images; 0 decodes in the main process"
    )

    @field_validator("path", "val_path")
    @classmethod
    def _check_path(cls, path: str | None) -> str | None:
        if (
            path is not None and printable(path) != path
        ):  # could not be written to config.yaml, or not be read in messages
            raise ValueError("has control characters or is not UTF-8. Rename the folder or file.")
        return path

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: str) -> str:
        if labels not in ("none", "folder") and LabelFile.parse(labels) is None:
            raise ValueError("must be none, folder, or a .csv, .tsv or .parquet file")
        return labels

    @property
    def source(self) -> str:
        """The path in the form that `open_source` expects, with the number of built-in scenes."""
        return f"scenes:{self.num_scenes}" if self.path == "scenes" else self.path

    def with_absolute_paths(self) -> "DataConfig":
        """Return the settings with absolute local paths, which do not depend on the working directory."""
        file = LabelFile.parse(self.labels)
        return self.model_copy(
            update={
                "path": absolute_source(self.path),
                "val_path": absolute_source(self.val_path) if self.val_path is not None else None,
                "labels": file.absolute() if file else self.labels,
            }
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class ImageSample(NamedTuple):
    """An image and its label."""

    image: UInt8[Tensor, "c h w"]
    label: int  # −1 without labels


def read_images(
    paths: Sequence[Path], size: tuple[int, int], channels: int = 3, max_pixels: int = MAX_PIXELS
) -> UInt8[Tensor, "b c h w"]:
    """Return the images in files, resized and cropped to (height, width) `size`; see `read_image`.

    Raises:
        UserError: If one is a folder, or cannot be read as an image.
        FileNotFoundError: If one does not exist.
    """
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path}: is a folder. Give image files; `vqvae2 reconstruct` also takes a single folder.")
    return torch.stack([hwc_to_chw(read_image(path, size, channels, max_pixels=max_pixels)) for path in paths])


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
        self.classes: tuple[str, ...] = source.index.classes if config.labels != "none" else ()
        self._unreadable = _new_flags(config, len(indices))
        # A command opens the images once per stage, but should warn only once about each.
        split_id = config.path, len(indices), zlib.crc32(source.index.hashes[indices].tobytes())
        self._warned = _warned.setdefault(split_id, _new_flags(config, len(indices)))

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
            crop = self._crop_position(seed)
            image = read_image(file, self.config.shape, self.config.channels, crop, name, self.config.max_pixels)
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


def _new_flags(config: DataConfig, count: int) -> Tensor:
    """Return one flag per image, in memory shared with the worker processes if there are any.

    Raises:
        UserError: If there is no shared memory.
    """
    flags = torch.zeros(count, dtype=torch.uint8)
    try:
        return flags.share_memory_() if config.num_workers else flags
    except (RuntimeError, OSError) as error:
        raise shared_memory_error(error) from None


def to_rgb(images: Shaped[Tensor, "b c h w"]) -> Shaped[Tensor, "b 3 h w"]:
    """Return grayscale images with the channel repeated, and RGBA images without alpha."""
    return images[:, :3].expand(-1, 3, -1, -1)


def to_float(images: UInt8[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
    """Convert uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "*b c h w"]) -> UInt8[Tensor, "*b c h w"]:
    """Convert images in [-1, 1] to uint8, with rounding and clipping."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

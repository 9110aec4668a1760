"""What every source of images has in common."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from vqvae2.data.index import ImageIndex
from vqvae2.errors import UserError

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def is_image(name: str) -> bool:
    """Whether a file's name, with or without folders, is that of an image; hidden files are none."""
    base = name.rpartition("/")[2]
    return f".{base.rpartition('.')[2].lower()}" in EXTENSIONS and "." in base and not base.startswith(".")


class Source(ABC):
    """Images by number, 0 … len(index) − 1, in the order of their names; safe to use in forked and spawned workers."""

    index: ImageIndex

    def __init__(self, path: str, index: ImageIndex) -> None:
        self.path, self.index = path, index

    @classmethod
    @abstractmethod
    def matches(cls, path: str) -> bool:
        """Whether `data.path` names a source of this kind."""

    @classmethod
    @abstractmethod
    def scan(cls, path: str) -> ImageIndex:
        """Look through the source; UserError where it cannot be used."""

    keeps_index: ClassVar[bool] = True  # whether a scan takes so long that its result is worth a file

    @classmethod
    def unchanged(cls, path: str, stamp: dict[str, Any]) -> bool:
        """Whether the source is still in the state in which an index with this stamp was made; cheap."""
        del path, stamp
        return False

    @abstractmethod
    def open(self, number: int, size: tuple[int, int]) -> Path | bytes | Image.Image:
        """An image's file, its bytes, or the picture; `UnreadableImageError` where they are damaged.

        `size`, height and width, is what it will be resized to: for sources that can draw at any size.
        """

    def describe(self, number: int) -> str:
        """Where an image is, for a person."""
        return f"{self.path}/{self.index.names[number]}"


def require(names: list[str], path: str) -> None:
    """UserError where a source holds no images."""
    if not names:
        raise UserError(f"data.path: {path} holds no images (looked for {', '.join(sorted(EXTENSIONS))})")

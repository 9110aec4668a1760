"""The interface of image sources."""

import collections
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from vqvae2 import distributed
from vqvae2.data.index import ImageIndex
from vqvae2.errors import UserError, printable

_log = logging.getLogger(__name__)
_LISTED_SUFFIXES = 5
_BITMAPS = (".bmp", ".gif", ".pgm", ".png", ".ppm", ".tif", ".tiff")
_COMPRESSED = (".avif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg", ".webp")
EXTENSIONS = frozenset({*_BITMAPS, *_COMPRESSED})


def is_image(name: str) -> bool:
    """Return whether a file name or path has an image extension. Hidden files are not images."""
    base = name.rpartition("/")[2]
    return f".{base.rpartition('.')[2].lower()}" in EXTENSIONS and "." in base and not base.startswith(".")


class Source(ABC):
    """Base class of image sources: images by number in [0, len(index)), in the order of the index.

    Sources can be used in forked and spawned worker processes.
    """

    index: ImageIndex

    def __init__(self, path: str, index: ImageIndex) -> None:
        self.path, self.index = path, index

    @classmethod
    @abstractmethod
    def matches(cls, path: str) -> bool:
        """Return whether this class opens `path`."""

    @classmethod
    def absolute(cls, path: str) -> str:
        """Return `path` in a form that does not depend on the working directory, with `~` expanded."""
        return path if "://" in path else absolute_path(path)

    @classmethod
    @abstractmethod
    def scan(cls, path: str) -> ImageIndex:
        """List the images of a source.

        Raises:
            UserError: If the source is missing, unreadable or has no images.
        """

    caches_index: ClassVar[bool] = True  # whether scanning is slow enough to cache the index

    @classmethod
    def is_unchanged(cls, path: str, stamp: dict[str, Any]) -> bool:
        """Return whether the source has not changed since an index with this stamp was made. Must be fast."""
        del path, stamp
        return False

    @abstractmethod
    def open(self, number: int, size: tuple[int, int]) -> Path | bytes | Image.Image:
        """Return the path, the encoded bytes or the decoded image of an image.

        `size` (height, width) is the target size, for sources that can render at any size.

        Raises:
            UnreadableImageError: If the image is missing or corrupted.
        """

    def describe(self, number: int) -> str:
        """Return the location of an image for messages."""
        return printable(f"{self.path}/{self.index.names[number]}")

    def location(self, number: int) -> str:
        """Return where an image is, the same for all paths that lead to the source. Links to folders are resolved."""
        return f"{resolve(self.path)}/{self.index.names[number]}"


@cache
def resolve(path: str) -> str:
    """Return a local path without links, `~` and `..`; a URL as it is."""
    return path if "://" in path else str(Path(path).expanduser().resolve())


def absolute_path(path: str) -> str:
    """Return a local path as an absolute path, with `~` expanded."""
    return str(Path(path).expanduser().absolute())


def require_images(names: list[str], path: str) -> None:
    """Check that a source has images.

    Raises:
        UserError: If there are none.
    """
    if not names:
        raise UserError(f"data.path: no images in {path}. Supported are {', '.join(sorted(EXTENSIONS))}.")


def warn_skipped(names: Iterable[str], path: object, hint: str = "") -> None:
    """Log how many files of a source are not read, by suffix, and a `hint`. `names` are file names or paths."""
    kinds: collections.Counter[str] = collections.Counter()
    for name in names:
        base = name.rpartition("/")[2]
        kinds["hidden" if base.startswith(".") else Path(base).suffix or base] += 1
    if kinds and distributed.get_rank() == 0:
        listed = ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common(_LISTED_SUFFIXES))
        _log.warning("vqvae2: %s", printable(f"{path}: {kinds.total():,} other files skipped: {listed}{hint}"))


def member_name(name: str) -> str:
    """Return the name of an archive member as a relative path: without a leading `/`, and without `.` and `..`."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def is_hidden(name: str) -> bool:
    """Return whether a relative path is hidden, or in a hidden folder."""
    return name.startswith(".") or "/." in name

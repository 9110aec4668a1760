"""A text file that lists image files, one path per line."""

import os
from pathlib import Path
from typing import Any

from vqvae2 import files
from vqvae2.data.image_io import UnreadableImageError
from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.base import Source, require_images, resolve
from vqvae2.errors import UserError, printable


class ListSource(Source):
    """The image files that a .txt file lists. Paths are absolute, or relative to the folder of the list.

    An image is named by its path in the list. The class of an image is the first folder that not all images are in.
    """

    @classmethod
    def matches(cls, path: str) -> bool:
        return path.lower().endswith(".txt")

    @classmethod
    def scan(cls, path: str) -> ImageIndex:
        files.require_file(Path(path), f"data.path: {path}", "Give a text file with one path per line.")
        stamp = _stamp(path)
        text = Path(path).read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        lines = {number: line.strip() for number, line in enumerate(text.split("\n"), 1) if line.strip()}
        names = [os.path.normpath(line).replace(os.sep, "/") for line in lines.values()]
        require_images(names, path)
        seen: set[str] = set()
        for number, name in zip(lines, names, strict=True):
            if name in seen:
                raise UserError(printable(f"data.path: {path}: line {number}: {name} is listed twice. Remove it."))
            seen.add(name)
        if not any(Path(path).parent.joinpath(name).exists() for name in (names[0], names[-1])):
            raise UserError(
                printable(
                    f"data.path: {path}: no such file: {names[0]}. Paths in a list are absolute, or relative to the "
                    "folder of the list."
                )
            )
        return ImageIndex.build(names, stamp=stamp)

    @classmethod
    def is_unchanged(cls, path: str, stamp: dict[str, Any]) -> bool:
        return Path(path).is_file() and stamp == _stamp(path)

    def open(self, number: int, size: tuple[int, int]) -> Path:
        del size
        path = self.file(number)
        if not path.is_file():
            raise UnreadableImageError(path, "no such file")
        return path

    def file(self, number: int) -> Path:
        """Return the path of an image."""
        return Path(self.path).parent / self.index.names[number]

    def location(self, number: int) -> str:
        path = self.file(number)
        return f"{resolve(str(path.parent))}/{path.name}"

    def describe(self, number: int) -> str:
        return printable(str(self.file(number)))


def _stamp(path: str) -> dict[str, Any]:
    status = Path(path).stat()
    return {"list": str(Path(path).resolve()), "size": status.st_size, "changed": status.st_mtime_ns}

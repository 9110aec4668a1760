"""Uncompressed .tar archives of images: one, or shards such as WebDataset's, `shards/{000000..000123}.tar`.

Shards may lie elsewhere, `s3://bucket/train-{000000..000123}.tar`. They are not streamed: each member is read at its
offset, so the order of training stays a function of seed and step over all images of all shards, and any step can be
resumed exactly.
"""

import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vqvae2.data.image_io import UnreadableImageError
from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.archive import ReadAt, open_archive, state
from vqvae2.data.sources.base import Source, is_image, require
from vqvae2.errors import UserError

_SCANS = 16  # shards looked through at once
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class TarSource(Source):
    """The images in uncompressed .tar archives.

    Those of a single archive are named by their paths in it, those of shards by shard and path. A text `NAME.cls`
    beside `NAME.jpg` gives its class (WebDataset's convention); without one the class is the first folder.
    """

    def __init__(self, path: str, index: ImageIndex) -> None:
        super().__init__(path, index)
        self._read = [ReadAt(shard) for shard in expand(path)]

    @classmethod
    def matches(cls, path: str) -> bool:
        return path.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))

    @classmethod
    def scan(cls, path: str) -> ImageIndex:
        if not path.lower().endswith(".tar"):
            raise UserError(f"data.path: {path} is compressed, so no image in it has an offset; unpack it to a .tar")
        shards = expand(path)
        stamp = state(shards)
        names: list[str] = []
        classes: list[str | None] = []
        columns: dict[str, list[int]] = {"shard": [], "offset": [], "length": []}
        with ThreadPoolExecutor(_SCANS) as pool:  # they wait for the disk or the network
            for number, (members, labels) in enumerate(pool.map(_members, shards)):
                prefix = f"{Path(shards[number]).stem}/" if len(shards) > 1 else ""
                for name, (offset, length) in members.items():
                    folder = name.split("/", 1)[0] if "/" in name else None
                    names.append(prefix + name)
                    classes.append(labels.get(_key(name), folder))
                    for column, value in zip(columns.values(), (number, offset, length), strict=True):
                        column.append(value)
        require(names, path)
        return ImageIndex.build(names, classes, columns, stamp, _in_order(classes))

    @classmethod
    def unchanged(cls, path: str, stamp: dict[str, Any]) -> bool:
        return stamp == state(expand(path))

    def open(self, number: int, size: tuple[int, int]) -> bytes:
        del size
        shard, offset, length = (int(self.index.columns[name][number]) for name in ("shard", "offset", "length"))
        data = self._read[shard](offset, length)
        if len(data) < length:
            raise UnreadableImageError(self.describe(number), "the archive ends within it")
        return data


def expand(path: str) -> list[str]:
    """The files that `{000000..000123}` in a path stands for; the path itself without braces."""
    found = _RANGE.search(path)
    if not found:
        return [path]
    first, last = found.groups()
    if int(first) > int(last):
        raise UserError(f"data.path: {path}: the range {found[0]} is empty; give the lower number first")
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [one for number in numbers for one in expand(path[: found.start()] + number + path[found.end() :])]


def _members(path: str) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Offset and length of every image of one archive, and the texts of its .cls files by key."""
    members: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with open_archive(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for entry in archive:
                name = entry.name.removeprefix("./")
                if entry.isreg() and is_image(name):
                    members[name] = entry.offset_data, entry.size
                elif entry.isreg() and name.endswith(".cls"):
                    text = archive.extractfile(entry)
                    labels[_key(name)] = text.read().decode("utf-8", "replace").strip() if text else ""
                archive.members = []  # tarfile would keep them  # pyright: ignore[reportAttributeAccessIssue]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"data.path: {path} is no readable uncompressed .tar archive ({error})") from None
    return members, labels


def _key(name: str) -> str:
    """WebDataset's key of a member: its path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def _in_order(classes: list[str | None]) -> tuple[str, ...]:
    """Names of classes, sorted; numbers by their value."""
    found = {name for name in classes if name is not None}
    return tuple(sorted(found, key=int if all(name.isdecimal() for name in found) else None))

"""Uncompressed .tar archives of images: one, or shards such as WebDataset's, `shards/{000000..000123}.tar`.

Shards can be remote: `s3://bucket/train-{000000..000123}.tar`. They are not streamed. Each member is read at its
offset, so training samples from all images of all shards in an order that depends on seed and step only.
"""

import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vqvae2.data.image_io import UnreadableImageError
from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.archive import RangeReader, archive_stamp, open_archive
from vqvae2.data.sources.base import Source, is_image, require_images
from vqvae2.errors import UserError

_SCAN_THREADS = 16  # shards scanned concurrently
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class TarSource(Source):
    """Images in uncompressed .tar archives, named by their paths in the archive, with the shard's name in front.

    A text file `NAME.cls` next to `NAME.jpg` is its class (WebDataset's convention). Otherwise the class is the first
    folder.
    """

    def __init__(self, path: str, index: ImageIndex) -> None:
        super().__init__(path, index)
        self._read = [RangeReader(shard) for shard in expand(path)]

    @classmethod
    def matches(cls, path: str) -> bool:
        return path.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))

    @classmethod
    def scan(cls, path: str) -> ImageIndex:
        if not path.lower().endswith(".tar"):
            raise UserError(
                f"data.path: {path} is compressed and does not allow random access. Decompress it to a .tar."
            )
        shards = expand(path)
        stamp = archive_stamp(shards)
        names: list[str] = []
        classes: list[str | None] = []
        columns: dict[str, list[int]] = {"shard": [], "offset": [], "length": []}
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:  # scanning is bound by the disk or the network
            for number, (members, labels) in enumerate(pool.map(_members, shards)):
                prefix = f"{Path(shards[number]).stem}/" if len(shards) > 1 else ""
                for name, (offset, length) in members.items():
                    folder = name.split("/", 1)[0] if "/" in name else None
                    names.append(prefix + name)
                    classes.append(labels.get(_key(name), folder))
                    for column, value in zip(columns.values(), (number, offset, length), strict=True):
                        column.append(value)
        require_images(names, path)
        return ImageIndex.build(names, classes, columns, stamp, _sorted_classes(classes))

    @classmethod
    def is_unchanged(cls, path: str, stamp: dict[str, Any]) -> bool:
        return stamp == archive_stamp(expand(path))

    def open(self, number: int, size: tuple[int, int]) -> bytes:
        del size
        shard, offset, length = (int(self.index.columns[name][number]) for name in ("shard", "offset", "length"))
        data = self._read[shard](offset, length)
        if len(data) < length:
            raise UnreadableImageError(self.describe(number), "truncated archive")
        return data


def expand(path: str) -> list[str]:
    """Expand `{000000..000123}` in a path to a list of paths. A path without braces is returned as is."""
    found = _RANGE.search(path)
    if not found:
        return [path]
    first, last = found.groups()
    if int(first) > int(last):
        raise UserError(f"data.path: {path}: the range {found[0]} is empty. Give the lower number first.")
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    paths = (path[: found.start()] + number + path[found.end() :] for number in numbers)
    return [expanded for path in paths for expanded in expand(path)]


def _members(path: str) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Return (offset, length) of each image in an archive, and the contents of its .cls files by key."""
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
                archive.members = []  # save memory: tarfile stores all entries  # pyright: ignore[reportAttributeAccessIssue]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"data.path: {path} is not a readable uncompressed .tar archive ({error}).") from None
    return members, labels


def _key(name: str) -> str:
    """Return the WebDataset key of a member: its path up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def _sorted_classes(classes: list[str | None]) -> tuple[str, ...]:
    """Return the distinct class names, sorted, numerically if all are numbers."""
    found = {name for name in classes if name is not None}
    return tuple(sorted(found, key=int if all(name.isdecimal() for name in found) else None))

"""Uncompressed .tar archives of images: one, or shards such as WebDataset's, `shards/{000000..000123}.tar`.

Shards can be remote: `s3://bucket/train-{000000..000123}.tar`. They are not streamed. Each member is read at its
offset, so training samples from all images of all shards in an order that depends on seed and step only.
"""

import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

from vqvae2.data.image_io import UnreadableImageError
from vqvae2.data.index import ImageIndex, class_folders, sorted_classes
from vqvae2.data.sources.archive import RangeReader, archive_stamp, open_archive
from vqvae2.data.sources.base import Source, is_hidden, is_image, member_name, require_images, resolve, warn_skipped
from vqvae2.errors import UserError

_SCAN_THREADS = 16  # shards scanned concurrently
_RANGE = re.compile(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}")
_MAX_SHARDS, _MAX_OPEN = 100_000, 256
_MAX_LABEL = 256  # characters of a .cls file
_MAX_INT64 = 2**63 - 1


class TarSource(Source):
    """Images in uncompressed .tar archives, named by their paths in the archive, with the shard's name in front.

    A text file `NAME.cls` next to `NAME.jpg` is its class (WebDataset's convention). Otherwise the class is the first
    folder.
    """

    def __init__(self, path: str, index: ImageIndex) -> None:
        super().__init__(path, index)
        self._shards = shards = expand(path)
        self._read = [RangeReader(shard, keep_open=len(shards) <= _MAX_OPEN) for shard in shards]

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
        stamp, shard_names = archive_stamp(shards), _shard_names(shards)
        names: list[str] = []
        prefixes: list[str] = []
        keys: list[str] = []
        labels: dict[str, str] = {}  # by shard and key
        skipped: list[str] = []
        columns: dict[str, list[int]] = {"shard": [], "offset": [], "length": []}
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:  # scanning is bound by the disk or the network
            for number, found in enumerate(pool.map(_read_members, shards)):
                labels |= {f"{shards[number]}/{key}": label for key, label in found.labels.items()}
                skipped += found.skipped
                for name, (offset, length) in found.images.items():
                    names.append(name)
                    keys.append(f"{shards[number]}/{_key(name)}")
                    prefixes.append(shard_names[number])
                    for column, value in zip(columns.values(), (number, offset, length), strict=True):
                        column.append(value)
        require_images(names, path)
        warn_skipped(skipped, path)
        classes = [labels.get(key, folder) for key, folder in zip(keys, class_folders(names), strict=True)]
        names = [prefix + name for prefix, name in zip(prefixes, names, strict=True)]
        return ImageIndex.build(names, classes, columns, stamp, _sorted_classes(classes, labels))

    @classmethod
    def is_unchanged(cls, path: str, stamp: dict[str, Any]) -> bool:
        return stamp == archive_stamp(expand(path))

    def location(self, number: int) -> str:
        shard, offset = (int(self.index.columns[name][number]) for name in ("shard", "offset"))
        return f"{resolve(self._shards[shard])}/{offset}"

    def open(self, number: int, size: tuple[int, int]) -> bytes:
        del size
        shard, offset, length = (int(self.index.columns[name][number]) for name in ("shard", "offset", "length"))
        data = self._read[shard](offset, length)
        if len(data) < length:
            raise UnreadableImageError(self.describe(number), "truncated archive")
        return data


def expand(path: str) -> list[str]:
    """Expand `{000000..000123}` in a path to a list of paths. A path without braces is returned as is.

    Raises:
        UserError: If a range is empty or there are too many paths.
    """
    count = 1
    for found in _RANGE.finditer(path):
        first, last = map(int, found.groups())
        if first > last:
            raise UserError(f"data.path: {path}: the range {found[0]} is empty. Give the lower number first.")
        count *= last - first + 1
    if count > _MAX_SHARDS:
        raise UserError(f"data.path: {path}: {count:,} shards, more than {_MAX_SHARDS:,}. Give a smaller range.")
    paths = [path]
    while found := _RANGE.search(paths[0]):
        numbers = [str(number).zfill(len(found[1])) for number in range(int(found[1]), int(found[2]) + 1)]
        paths = [_RANGE.sub(number, path, count=1) for path in paths for number in numbers]
    return paths


def _shard_names(shards: list[str]) -> list[str]:
    """Return what is before the names of the images of each shard: nothing if there is only one shard."""
    names = [Path(shard).stem for shard in shards]
    if len(set(names)) < len(names):  # the shards differ in their folders
        common = os.path.commonpath(shards)
        names = [shard.removeprefix(common).strip("/").removesuffix(".tar") for shard in shards]
    return [f"{name}/" for name in names] if len(names) > 1 else [""]


class _Members(NamedTuple):
    """Contents of one archive."""

    images: dict[str, tuple[int, int]]  # name → (offset, length)
    labels: dict[str, str]  # key → text of the .cls file
    skipped: list[str]  # names of other files


def _read_members(path: str) -> _Members:
    """List an archive.

    Raises:
        UserError: If it is corrupted, or a .cls file is not a label.
    """
    members, last = _Members({}, {}, []), -1
    try:
        with open_archive(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for entry in archive:
                if entry.offset <= last or entry.size < 0:  # a negative size would make tarfile loop forever
                    raise tarfile.ReadError(f"invalid size of {entry.name}")
                last, name = entry.offset, member_name(entry.name)
                archive.members = []  # save memory: tarfile stores all entries  # pyright: ignore[reportAttributeAccessIssue]
                if not entry.isreg() or is_hidden(name.rpartition("/")[0]):
                    continue
                if is_image(name):
                    members.images[name] = min(entry.offset_data, _MAX_INT64), min(entry.size, _MAX_INT64)
                elif name.endswith(".cls"):
                    members.labels[_key(name)] = _read_label(archive.extractfile(entry), f"{path}/{name}")
                else:
                    members.skipped.append(name)
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        raise UserError(f"data.path: {path} is not a readable uncompressed .tar archive ({error}).") from None
    return members


def _read_label(file: IO[bytes] | None, name: str) -> str:
    """Return the class in a .cls file: a number from 0, or a name in one line."""
    text = (file.read(_MAX_LABEL + 1) if file else b"").decode("utf-8", "surrogateescape")
    label = text.strip()
    if not label or len(text) > _MAX_LABEL or len(label.splitlines()) > 1 or re.fullmatch(r"[-+][0-9]+", label):
        shown = label if len(label) <= 20 else f"{label[:20]}…"
        raise UserError(f"data.path: {name}: {shown!r} is not a class. Write a number from 0, or a name in one line.")
    return label


def _key(name: str) -> str:
    """Return the WebDataset key of a member: its path up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def _sorted_classes(classes: list[str | None], labels: dict[str, str]) -> tuple[str, ...]:
    """Return the distinct class names, sorted, numerically if all are numbers.

    Raises:
        UserError: If .cls files hold both numbers and names.
    """
    words = [f"{key}.cls is {label!r}" for key, label in labels.items() if not label.isdecimal()]
    if words and len(words) < len(labels):
        raise UserError(f"data.path: {words[0]}, but other .cls files hold numbers. Use only one of them.")
    return sorted_classes({name for name in classes if name is not None})

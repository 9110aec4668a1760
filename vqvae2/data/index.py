"""The index of a data set: names, labels and split of its images.

Names are stored in one byte array and one offset array, not as Python objects. The index file is a safetensors file
that is memory-mapped, so opening it is fast and worker processes share it.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from vqvae2 import files
from vqvae2.errors import printable

_FORMAT = 1
_TYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "U64": np.uint64}
IntArray = NDArray[np.int64]


class StringTable(Sequence[str]):
    """Strings in one array of UTF-8 bytes.

    `ends` are the end offsets of the strings. `indices` optionally selects and orders them.

    >>> table = StringTable.from_strings(["cat.png", "dog.png", "eel.png"])
    >>> table[1], list(table.take(np.array([2, 0])))
    ('dog.png', ['eel.png', 'cat.png'])
    """

    def __init__(self, text: NDArray[np.uint8], ends: IntArray, indices: IntArray | None = None) -> None:
        self.text, self.ends, self.indices = text, ends, indices

    @classmethod
    def from_strings(cls, strings: Sequence[str]) -> Self:
        """Build a table from strings."""
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        text = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(text, np.cumsum([len(string) for string in encoded], dtype=np.int64))

    def take(self, indices: IntArray) -> "StringTable":
        """Return a view of the strings at these indices."""
        return StringTable(self.text, self.ends, indices if self.indices is None else self.indices[indices])

    def __len__(self) -> int:
        return len(self.ends if self.indices is None else self.indices)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "StringTable": ...
    def __getitem__(self, index: int | slice) -> "str | StringTable":
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self)), dtype=np.int64))
        row = range(len(self))[index] if self.indices is None else int(self.indices[index])
        start = int(self.ends[row - 1]) if row else 0
        return self.text[start : int(self.ends[row])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class ImageIndex:
    """Metadata of all images of a source, sorted by name."""

    names: StringTable
    labels: NDArray[np.int32]  # indices into `classes`, −1 for images without a label
    hashes: NDArray[np.uint64]  # of the names; they determine the split
    classes: tuple[str, ...]
    columns: dict[str, IntArray] = field(default_factory=dict)  # location of each image in the source
    stamp: dict[str, Any] = field(default_factory=dict)  # state of the source when it was scanned

    @classmethod
    def build(
        cls,
        names: Sequence[str],
        class_names: Sequence[str | None] | None = None,
        columns: Mapping[str, Sequence[int]] | None = None,
        stamp: dict[str, Any] | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> Self:
        """Build an index, sorted by name. Default classes are those of `class_folders`.

        `classes` keeps class names printable. Names that are not UTF-8 could not be written to JSON.
        """
        order = sorted(range(len(names)), key=names.__getitem__)
        if class_names is None:
            class_names = class_folders(names)
        classes = classes if classes is not None else tuple(sorted({name for name in class_names if name is not None}))
        label_of: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
        return cls(
            StringTable.from_strings([names[i] for i in order]),
            np.fromiter((label_of.get(class_names[i], -1) for i in order), np.int32, len(names)),
            _hash_all(names[i] for i in order),
            tuple(map(printable, classes)),
            {name: np.asarray(column, np.int64)[order] for name, column in (columns or {}).items()},
            stamp or {},
        )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: IntArray, columns: dict[str, IntArray] | None = None) -> "ImageIndex":
        """Return a copy of the index with only these images."""
        return ImageIndex(
            StringTable.from_strings(list(self.names.take(indices))),
            self.labels[indices],
            self.hashes[indices],
            self.classes,
            {name: column[indices] for name, column in self.columns.items()} if columns is None else columns,
        )

    def with_labels(self, class_names: Sequence[str | None], classes: tuple[str, ...]) -> "ImageIndex":
        """Return the index with other labels: the class of each image, None without one, and all classes in order."""
        label_of: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
        labels = np.fromiter((label_of.get(name, -1) for name in class_names), np.int32, len(self))
        return replace(self, labels=labels, classes=tuple(map(printable, classes)))

    def split(self, val_fraction: float, by_folder: bool = False) -> tuple[IntArray, IntArray]:
        """Return the indices of training and validation images, `val_fraction` of them for validation.

        The split depends only on the hash of the name, so adding images does not move others, unless a split would
        otherwise be empty: each has at least one image. With `by_folder`, the hash is that of the name's folder, so
        that the images of a folder stay together; training images are empty if there is only one folder.
        """
        hashes = _hash_all(name.rpartition("/")[0] for name in self.names) if by_folder else self.hashes
        quantiles = hashes.astype(np.float64) / 2**64
        held_out = (quantiles <= max(val_fraction, quantiles.min())) & (quantiles < quantiles.max())
        if not held_out.any():
            held_out = quantiles <= quantiles.min()
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def digest(self, indices: IntArray) -> str:
        """Return the SHA-256 of the names and labels of these images, in this order."""
        sha = hashlib.sha256(np.ascontiguousarray(self.labels[indices], "<i4").tobytes())
        sha.update("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        for name in self.names.take(indices):
            sha.update(b"\0" + name.encode("utf-8", "surrogateescape"))
        return sha.hexdigest()

    def save(self, path: Path) -> None:
        """Write the index atomically."""
        header = {"format": _FORMAT, "classes": self.classes, "stamp": self.stamp}
        arrays = {"text": self.names.text, "ends": self.names.ends, "labels": self.labels, "hashes": self.hashes}
        arrays |= {f"column.{name}": column for name, column in self.columns.items()}
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        text = json.dumps({"sha256": _digest(header, arrays)} | header)
        with files.atomic_write(path) as partial:
            try:
                save_file(arrays, partial, {"index": text})
            except SafetensorError as error:  # for example a full disk
                raise OSError(None, str(error), str(path)) from None

    @classmethod
    def load(cls, path: Path) -> "ImageIndex | None":
        """Load an index file, memory-mapped. Return None if it is missing or corrupted."""
        try:
            data = np.asarray(np.memmap(path, np.uint8, "r"))
            start = 8 + int.from_bytes(data[:8].tobytes(), "little")
            layout = files.parse_json(data[8:start].tobytes(), path, "")
            header = files.parse_json(layout.pop("__metadata__")["index"].encode(), path, "")
            digest = header.pop("sha256")
            arrays = {}
            for name, entry in layout.items():
                begin, end = entry["data_offsets"]
                arrays[name] = data[start + begin : start + end].view(_TYPES[entry["dtype"]])
                if len(data) < start + end:
                    return None
            columns = {k.removeprefix("column."): v for k, v in arrays.items() if k.startswith("column.")}
            names = StringTable(arrays["text"], arrays["ends"])
            if header["format"] != _FORMAT or digest != _digest(header, arrays):
                return None
            index = cls(names, arrays["labels"], arrays["hashes"], tuple(header["classes"]), columns, header["stamp"])
            return index if index._is_valid() else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _is_valid(self) -> bool:
        """Return whether all arrays have one entry per image, and all entries are in range."""
        ends, labels = self.names.ends, self.labels
        if any(len(array) != len(labels) for array in (ends, self.hashes, *self.columns.values())):
            return False
        last = int(ends[-1]) if len(ends) else 0
        return (
            last == len(self.names.text)
            and bool((np.diff(ends, prepend=0) >= 0).all())
            and bool(((labels >= -1) & (labels < len(self.classes))).all())
            and all(isinstance(name, str) for name in self.classes)
            and isinstance(self.stamp, dict)
        )


def class_folders(names: Sequence[str]) -> list[str | None]:
    """Return the class of each image: the first folder of its name, None without one.

    Folders that contain all class folders are skipped, because they carry no class.

    >>> class_folders(["photos/cat/0.png", "photos/dog/1.png"])
    ['cat', 'dog']
    >>> class_folders(["cat/0.png", "cat/1.png"])
    ['cat', 'cat']
    """
    start = 0
    while names and (end := names[0].find("/", start)) >= 0:
        shared = names[0][: end + 1]
        if not all(name.startswith(shared) and "/" in name[end + 1 :] for name in names):
            break
        start = end + 1
    return [name[start:].split("/", 1)[0] if "/" in name[start:] else None for name in names]


def _hash_all(names: Iterable[str]) -> NDArray[np.uint64]:
    """Return the first 64 bits of the SHA-256 of each name."""
    hashed = (hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8] for name in names)
    return np.array([int.from_bytes(digest) for digest in hashed], np.uint64)


def sorted_classes(names: Collection[str]) -> tuple[str, ...]:
    """Return class names in order: numerically if all are numbers.

    >>> sorted_classes({"10", "9"}), sorted_classes({"10", "a"}), sorted_classes({"1", "01", "001", "2"})
    (('9', '10'), ('10', 'a'), ('001', '01', '1', '2'))
    """
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))  # 1 and 01 are different classes
    return tuple(sorted(names))


def _digest(header: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 of the header and of the name and bytes of every array."""
    sha = hashlib.sha256(json.dumps(header).encode())
    for name in sorted(arrays):
        sha.update(f"\0{name}\0{arrays[name].dtype}\0".encode())
        sha.update(np.ascontiguousarray(arrays[name]).data)
    return sha.hexdigest()

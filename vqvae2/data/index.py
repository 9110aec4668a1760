"""The index of a data set: which images it has, their labels, and on which side of the split each one is.

A million names are one array of bytes and one of offsets, not a million objects; on disk the index is a safetensors
file that readers map into memory, so that opening it costs nothing and worker processes share it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from vqvae2 import files

_FORMAT = 1
_TYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "U64": np.uint64}
Integers = NDArray[np.int64]


class StringTable(Sequence[str]):
    """Strings in one array of bytes; `ends` are the offsets behind each, `chosen` which of them and in what order."""

    def __init__(self, text: NDArray[np.uint8], ends: Integers, chosen: Integers | None = None) -> None:
        self.text, self.ends, self.chosen = text, ends, chosen

    @classmethod
    def from_strings(cls, strings: Sequence[str]) -> Self:
        """A table of these names."""
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        text = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(text, np.cumsum([len(name) for name in encoded], dtype=np.int64))

    def take(self, chosen: Integers) -> "StringTable":
        """A view of the names at these positions."""
        return StringTable(self.text, self.ends, chosen if self.chosen is None else self.chosen[chosen])

    def __len__(self) -> int:
        return len(self.ends if self.chosen is None else self.chosen)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "StringTable": ...
    def __getitem__(self, index: int | slice) -> "str | StringTable":
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self)), dtype=np.int64))
        at = range(len(self))[index] if self.chosen is None else int(self.chosen[index])
        start = int(self.ends[at - 1]) if at else 0
        return self.text[start : int(self.ends[at])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class ImageIndex:
    """What is known of every image of a source without opening it, sorted by name."""

    names: StringTable
    labels: NDArray[np.int32]  # positions in `classes`; −1 where an image has none
    hashes: NDArray[np.uint64]  # of the names; they decide the split
    classes: tuple[str, ...]
    columns: dict[str, Integers] = field(default_factory=dict)  # where the source finds each image
    stamp: dict[str, Any] = field(default_factory=dict)  # the state of the source that was scanned

    @classmethod
    def build(
        cls,
        names: Sequence[str],
        class_names: Sequence[str | None] | None = None,
        columns: Mapping[str, Sequence[int]] | None = None,
        stamp: dict[str, Any] | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> Self:
        """Sort by name. An image's class is its first folder unless `class_names` gives one, or None."""
        order = sorted(range(len(names)), key=names.__getitem__)
        if class_names is None:
            class_names = [name.split("/", 1)[0] if "/" in name else None for name in names]
        classes = classes if classes is not None else tuple(sorted({name for name in class_names if name is not None}))
        label_of: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
        hashed = (hashlib.sha256(names[i].encode("utf-8", "surrogateescape")).digest()[:8] for i in order)
        return cls(
            StringTable.from_strings([names[i] for i in order]),
            np.fromiter((label_of.get(class_names[i], -1) for i in order), np.int32, len(names)),
            np.fromiter(map(int.from_bytes, hashed), np.uint64, len(names)),
            classes,
            {name: np.asarray(column, np.int64)[order] for name, column in (columns or {}).items()},
            stamp or {},
        )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Integers, columns: dict[str, Integers] | None = None) -> "ImageIndex":
        """The index of these images alone, in its own memory."""
        return ImageIndex(
            StringTable.from_strings(list(self.names.take(chosen))),
            self.labels[chosen],
            self.hashes[chosen],
            self.classes,
            {name: column[chosen] for name, column in self.columns.items()} if columns is None else columns,
        )

    def split(self, share: float) -> tuple[Integers, Integers]:
        """Positions of training and held-out images; a side depends on the name alone, so more files move none.

        At least one image is on each side, for data sets so small that chance would leave one empty.
        """
        places = self.hashes.astype(np.float64) / 2**64
        order = np.argsort(places, kind="stable")
        held_out = places <= max(share, places[order[0]])
        held_out[order[-1]] = False
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def digest(self, chosen: Integers) -> str:
        """SHA-256 of the names and labels of these images, in their order."""
        sha = hashlib.sha256(np.ascontiguousarray(self.labels[chosen], "<i4").tobytes())
        sha.update("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        for name in self.names.take(chosen):
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
            save_file(arrays, partial, {"index": text})

    @classmethod
    def load(cls, path: Path) -> "ImageIndex | None":
        """The index in a file, mapped into memory; None where there is none, or a damaged one."""
        try:
            data = np.asarray(np.memmap(path, np.uint8, "r"))
            start = 8 + int.from_bytes(data[:8].tobytes(), "little")
            layout = json.loads(data[8:start].tobytes())
            header = json.loads(layout.pop("__metadata__")["index"])
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
            return cls(names, arrays["labels"], arrays["hashes"], tuple(header["classes"]), columns, header["stamp"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def _digest(header: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the header, and of the name and bytes of every array."""
    sha = hashlib.sha256(json.dumps(header).encode())
    for name in sorted(arrays):
        sha.update(f"\0{name}\0{arrays[name].dtype}\0".encode())
        sha.update(np.ascontiguousarray(arrays[name]).data)
    return sha.hexdigest()

"""Code stores: the code maps of all images of a split in LMDB, as little-endian integers with a JSON header.

One LMDB value holds `RECORDS_PER_VALUE` records of fixed size, which fills pages well. A reader copies only the
requested records from the memory map. The names of the images are stored next to each value. Nothing is pickled.
Batches keep narrow integer types, at most half of int64; convert them on the device with `to_int64`.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import lmdb
import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from vqvae2 import files
from vqvae2.code_maps import MapSpec
from vqvae2.config import Config
from vqvae2.data import lmdb_environment
from vqvae2.errors import UserError

RECORDS_PER_VALUE = 64  # records in one LMDB value
UNREADABLE_LABEL = -2  # label of a record whose image could not be read; −1 means no label
_HEADER = b"header"
_FORMAT = 3
_MAX_CODES = 2**28  # in a record
_FIX = "Delete the folder and run `vqvae2 extract-codes`."


class CodeHeader(Config):
    """Contents and provenance of a code store."""

    format: int = _FORMAT
    levels: tuple[MapSpec, ...] = Field(min_length=1, max_length=64)  # finest first
    count: int = Field(ge=0, le=2**40)  # number of records, including those of unreadable images
    classes: tuple[str, ...] = ()  # class names, empty without labels
    split: str
    source: str  # `data.path` of the data set
    data: str = ""  # digest of the names and labels of the images, not of their location
    flip: bool = False  # whether records 2k and 2k + 1 are image k and its mirror image
    autoencoder: str  # digest of the weights that encoded the images
    unreadable: tuple[int, ...] = ()  # records without codes, which readers skip; set by `finish`
    complete: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(level.num_codes for level in self.levels) > _MAX_CODES:
            raise ValueError(f"levels: more than {_MAX_CODES:,} codes in a record")
        bounds = (-1, *self.unreadable, self.count)
        if any(first >= second for first, second in pairwise(bounds)):
            raise ValueError(f"unreadable: expected increasing record numbers below {self.count}")
        return self

    def __len__(self) -> int:
        """Return the number of records with codes."""
        return self.count - len(self.unreadable)

    @property
    def record_dtype(self) -> np.dtype[Any]:
        """Structured dtype of a record: the label (−1 for none) and the code maps, finest first."""
        maps = [
            (
                f"level{index}",
                "u1" if level.codebook_size <= 256 else "<u2" if level.codebook_size <= 65536 else "<u4",
                level.shape,
            )
            for index, level in enumerate(self.levels)
        ]
        return np.dtype([("label", "<i4"), *maps])

    @property
    def identity(self) -> dict[str, Any]:
        """Fields that must be equal to resume an extraction. The location of the images is not one of them."""
        return self.model_dump(mode="json", exclude={"source", "unreadable", "complete"})

    @property
    def digest(self) -> str:
        """SHA-256 of the provenance. Stores of the same images, split and autoencoder have the same digest."""
        made_from = self.identity | {"unreadable": self.unreadable}
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    def check_autoencoder(self, digest: str | None, path: Path, command: str = "vqvae2 extract-codes") -> None:
        """Check that the store at `path`, which `command` writes, was made with the autoencoder of this digest.

        Raises:
            UserError: If it was made with another one.
        """
        if digest != self.autoencoder:
            raise UserError(
                f"{path}: codes of the autoencoder {self.autoencoder[:12]}…, but the run's autoencoder is "
                f"{str(digest)[:12]}…. Delete this folder and run `{command}`."
            )

    def check_data(self, digest: str, path: Path, command: str = "vqvae2 extract-codes") -> None:
        """Check that the store at `path`, which `command` writes, is of the images or recordings with this digest.

        Raises:
            UserError: If it is of other ones.
        """
        if digest != self.data:
            raise UserError(
                f"{path}: codes of other data than `data.path` has. Delete this folder and run `{command}`."
            )


class CodeBatch(NamedTuple):
    """Codes and labels of one image or a batch."""

    codes: tuple[Int[Tensor, "*b h w"], ...]  # finest level first; a narrow integer type or int64
    label: Int[Tensor, "*b"]  # −1 without labels


def to_int64(batch: CodeBatch) -> CodeBatch:
    """Convert codes and labels to int64 on their device."""
    return CodeBatch(tuple(level.long() for level in batch.codes), batch.label.long())


class CodeStore(Dataset[CodeBatch]):
    """Data set of the records of a finished store. Worker processes each open the file on their own.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> levels = tuple(MapSpec(codebook_size=512, height=side, width=side) for side in (8, 4))
    >>> header = CodeHeader(levels=levels, count=3, split="train", source="photos", autoencoder="0" * 64)
    >>> writer = CodeWriter(Path(folder.name), header)
    >>> codes = [torch.full((3, *level.shape), 7) for level in levels]
    >>> writer.write(0, codes, labels=torch.tensor([-1, -1, -1]), names=["a.png", "b.png", "c.png"])
    >>> writer.finish()

    >>> store = CodeStore.open(Path(folder.name))
    >>> len(store), store.image_name(2)
    (3, 'c.png')
    >>> batch = store.read([0, 2])
    >>> [tuple(level.shape) for level in batch.codes], batch.label.tolist()
    ([(2, 8, 8), (2, 4, 4)], [-1, -1])

    >>> lmdb_environment.close_reader(Path(folder.name))
    >>> folder.cleanup()
    """

    def __init__(self, path: Path, header: CodeHeader) -> None:
        self.path, self.header = path, header
        self._count = len(header)
        self._scratch: np.ndarray | None = None  # reused, because allocating new pages for each batch is slower
        # The k-th unreadable record precedes all readable records with an index of at least (record − k).
        self._shifts = np.array(header.unreadable, np.int64) - np.arange(len(header.unreadable))

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open the store at `path`.

        Raises:
            UserError: If it is missing, unfinished, corrupted or not a code store.
        """
        path = Path(path)
        store = cls(path, cls.read_header(path))
        if not (store.header.complete and lmdb_environment.is_sealed(path)):
            raise UserError(f"{path}: unfinished code store. Run `vqvae2 extract-codes` again to complete it.")
        with lmdb_environment.open_reader(path).begin(buffers=True) as transaction:
            missing = next(_missing_values(transaction, store.header), None)
            if missing is not None:
                raise UserError(f"{path}: corrupted code store (value {missing} is missing or truncated). {_FIX}")
            if any(_label(transaction, store.header, i) != UNREADABLE_LABEL for i in store.header.unreadable):
                raise UserError(f"{path}: corrupted code store (`unreadable` lists a readable record). {_FIX}")
        return store

    @staticmethod
    def read_header(path: Path) -> CodeHeader:
        """Return the header of the finished or unfinished store at `path`.

        Raises:
            UserError: If it is missing, corrupted or not a code store.
        """
        if not (path / "data.mdb").is_file():
            raise UserError(f"{path}: no code store. Create it with `vqvae2 extract-codes`.")
        header = lmdb_environment.get(lmdb_environment.open_reader(path), _HEADER)
        if header is None:
            raise UserError(f"{path}: not a code store (no header). Delete the folder and run `vqvae2 extract-codes`.")
        return _parse(header, path)

    def __len__(self) -> int:
        return len(self.header)

    def __getitem__(self, key: int | tuple[int, int]) -> CodeBatch:
        batch = to_int64(self.__getitems__([key]))
        return CodeBatch(tuple(level[0] for level in batch.codes), batch.label[0])

    def read(self, indices: Sequence[int]) -> CodeBatch:
        """Return int64 codes (B, H_l, W_l) and labels (B,) of the given records."""
        return to_int64(self.__getitems__(indices))

    def __getitems__(self, keys: Sequence[Any]) -> CodeBatch:
        """Return a collated batch with narrow integer types."""
        indices = [key[0] if isinstance(key, tuple) else key for key in keys]
        dtype = self.header.record_dtype
        size, scratch = dtype.itemsize, self._scratch
        self._scratch = None  # other threads allocate their own
        if scratch is None or len(scratch) < len(indices):
            scratch = np.empty(len(indices), dtype)
        batch, target = scratch[: len(indices)], memoryview(scratch.view(np.uint8).data)
        numbers, offsets = np.divmod(self._records(indices), RECORDS_PER_VALUE)
        values, position = lmdb_environment.cached_values(self.path), 0
        for number, start in zip(numbers.tolist(), (offsets * size).tolist(), strict=True):
            value = values[number]
            assert value is not None, "checked by `open`"
            target[position : position + size] = value[start : start + size]
            position += size
        maps = tuple(
            _to_narrow_tensor(batch[f"level{index}"], level.codebook_size)
            for index, level in enumerate(self.header.levels)
        )
        labels = torch.from_numpy(batch["label"].copy())
        self._scratch = scratch
        self._check_range(batch)
        return CodeBatch(maps, labels)

    def _check_range(self, batch: np.ndarray) -> None:
        """Raise UserError if a label or a code does not exist."""
        labels, num_classes = batch["label"], len(self.header.classes)
        fields = {"label": num_classes} | {
            f"level{i}": level.codebook_size for i, level in enumerate(self.header.levels)
        }
        if len(batch) and (labels.min() < -1 or any(batch[name].max() >= size for name, size in fields.items())):
            raise UserError(f"{self.path}: corrupted code store (a code or a label is out of range). {_FIX}")

    def image_name(self, index: int) -> str:
        """Return the name of the image of a record."""
        number, offset = divmod(self._record(index), RECORDS_PER_VALUE)
        names = lmdb_environment.get(lmdb_environment.open_reader(self.path), _names_key(number)) or b""
        return (names.decode("utf-8", "surrogateescape").split("\0") + [""] * RECORDS_PER_VALUE)[offset]

    def is_mirrored(self, index: int) -> bool:
        """Return whether a record has the codes of the mirror image."""
        return self.header.flip and self._record(index) % 2 == 1

    def _record(self, index: int) -> int:
        """Return the record number of one index."""
        return int(self._records([index])[0])

    def _records(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Return record numbers of indices, which do not count unreadable records."""
        chosen = np.asarray(indices, np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < self._count:
            raise IndexError(f"indices {chosen.min()} to {chosen.max()} out of range for {self._count} records")
        return chosen + np.searchsorted(self._shifts, chosen, side="right") if len(self._shifts) else chosen


class CodeWriter:
    """Writer of a code store, one value of `RECORDS_PER_VALUE` records at a time. See `CodeStore` for an example.

    Values of an interrupted writer are kept, and `missing_values` returns the remaining ones.

    Raises:
        UserError: If the folder has another code store.
    """

    def __init__(self, path: Path, header: CodeHeader) -> None:
        self.path, self.header = path, header
        self.environment = lmdb_environment.open_writer(path)
        found = lmdb_environment.get(self.environment, _HEADER)
        if found is not None and _parse(found, path).identity != header.identity:
            self.environment.close()
            raise UserError(f"{path}: codes of other images or another autoencoder. {_FIX}")
        if found is None:
            self._put(_HEADER, header.to_json())

    def missing_values(self) -> list[int]:
        """Return the numbers of the values not yet written. Value v holds the records [64 v, 64 v + 64)."""
        with self.environment.begin(buffers=True) as transaction:
            return list(_missing_values(transaction, self.header))

    def write(
        self, number: int, codes: Sequence[Int[Tensor, "n h w"]], labels: Int[Tensor, " n"], names: Sequence[str] = ()
    ) -> None:
        """Write one value in its own transaction. Records with the label `UNREADABLE_LABEL` get no codes."""
        records = np.zeros(len(labels), self.header.record_dtype)
        records["label"] = labels.cpu().numpy()
        readable = records["label"] != UNREADABLE_LABEL
        for index, level in enumerate(codes):
            records[f"level{index}"][readable] = level.cpu().numpy()[readable]
        entries = [(lmdb_environment.encode_key(number), records.tobytes())]
        if names:
            entries.append((_names_key(number), "\0".join(names).encode("utf-8", "surrogateescape")))
        lmdb_environment.put(self.environment, entries)

    def unreadable_records(self) -> list[int]:
        """Return the numbers of the records without codes."""
        record, found = self.header.record_dtype, []
        with self.environment.begin(buffers=True) as transaction:
            for number in range(-(-self.header.count // RECORDS_PER_VALUE)):
                labels = np.frombuffer(transaction.get(lmdb_environment.encode_key(number)) or b"", record)["label"]
                found += (np.flatnonzero(labels == UNREADABLE_LABEL) + number * RECORDS_PER_VALUE).tolist()
        return found

    def finish(self) -> None:
        """Mark the store as complete, close and seal it."""
        assert not self.missing_values(), "values are missing"
        done = self.header.model_copy(update={"unreadable": tuple(self.unreadable_records()), "complete": True})
        self._put(_HEADER, done.to_json())
        self.close()
        lmdb_environment.seal(self.path)

    def close(self) -> None:
        """Close the file. A new writer can resume."""
        self.environment.close()

    def _put(self, key: bytes, value: bytes) -> None:
        lmdb_environment.put(self.environment, [(key, value)])


def _to_narrow_tensor(field: np.ndarray, codebook_size: int) -> Tensor:
    """Convert a field of records to the narrowest type that torch supports on all devices (not uint16)."""
    kind = np.uint8 if codebook_size <= 2**8 else np.int16 if codebook_size <= 2**15 else np.int32
    return torch.from_numpy(field.astype(kind))


def _missing_values(transaction: lmdb.Transaction, header: CodeHeader) -> Iterator[int]:
    """Yield the numbers of the values that do not exist or have another length than their records."""
    size = header.record_dtype.itemsize
    for number, start in enumerate(range(0, header.count, RECORDS_PER_VALUE)):
        value: Any = transaction.get(lmdb_environment.encode_key(number))
        if value is None or len(value) != min(RECORDS_PER_VALUE, header.count - start) * size:
            yield number


def _label(transaction: lmdb.Transaction, header: CodeHeader, record: int) -> int:
    """Return the label of a record of an existing value."""
    number, offset = divmod(record, RECORDS_PER_VALUE)
    value: Any = transaction.get(lmdb_environment.encode_key(number))
    return int(np.frombuffer(value, header.record_dtype)["label"][offset])


def _parse(header: bytes, path: Path) -> CodeHeader:
    data = files.parse_json(header, path, _FIX)
    if not isinstance(data, dict) or "autoencoder" not in data:
        kind = "images" if isinstance(data, dict) and data.get("kind") == "images" else "another database"
        raise UserError(f"{path}: not a code store, but {kind}. Check the path.")
    if data.get("format") != _FORMAT:
        raise UserError(
            f"{path}: code store of format {str(data.get('format'))[:20]}; this version reads format {_FORMAT}. {_FIX}"
        )
    return CodeHeader.from_dict(data, str(path), fix=_FIX)


def _names_key(number: int) -> bytes:
    return b"names" + lmdb_environment.encode_key(number)

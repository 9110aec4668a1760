"""The code store: the code maps of every image, in LMDB, as raw little-endian integers with a JSON header.

Records of fixed size stand `RECORDS_PER_VALUE` together in one LMDB value, so that pages are full; a reader takes slices of the
memory map and copies only the records it was asked for. Beside each value lie the names of its images. Nothing is
pickled. Batches leave the store as narrow as they lie in it, an eighth or a quarter of int64: `widen` makes indices of
them on the device.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from vqvae2.code_maps import MapSpec
from vqvae2.config import Config
from vqvae2.data import lmdb_store
from vqvae2.errors import UserError

RECORDS_PER_VALUE = 64  # records in one LMDB value
UNREADABLE_LABEL = -2  # the label of a record whose image could not be read; −1 is no label
_HEADER = b"header"
_FORMAT = 3


class CodeHeader(Config):
    """What a code store holds and what it was made from."""

    format: int = _FORMAT
    levels: tuple[MapSpec, ...]  # finest first
    count: int  # records, those of unreadable images included
    classes: tuple[str, ...] = ()  # names of the labels; empty without labels
    split: str
    source: str  # the data set, `data.path`
    data: str = ""  # digest of the names and labels of its images, which say what they are wherever they lie
    flip: bool = False  # whether record 2k is image k and record 2k + 1 its mirror image
    autoencoder: str  # digest of the weights that made the codes
    unreadable: tuple[int, ...] = ()  # records without codes, which readers never see; known in the end
    complete: bool = False

    def __len__(self) -> int:
        """Records that hold codes."""
        return self.count - len(self.unreadable)

    @property
    def record_dtype(self) -> np.dtype[Any]:
        """One image's label (−1 for none) and code maps, finest first."""
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
        """What must agree for one extraction to go on with another: not where the images lie."""
        return self.model_dump(mode="json", exclude={"source", "unreadable", "complete"})

    @property
    def digest(self) -> str:
        """SHA-256 of what the codes were made from: the same images, split and autoencoder give the same codes."""
        made_from = self.identity | {"unreadable": self.unreadable}
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    def check_autoencoder(self, digest: str | None, path: Path) -> None:
        """UserError where the store at `path` was made by other weights than those with this digest."""
        if digest != self.autoencoder:
            raise UserError(
                f"{path}: holds codes of the autoencoder {self.autoencoder[:12]}…, but the run's autoencoder is "
                f"{str(digest)[:12]}…; delete this folder and run `vqvae2 extract-codes`"
            )


class CodeBatch(NamedTuple):
    """The codes of one image or of a batch."""

    codes: tuple[Int[Tensor, "*b h w"], ...]  # finest level first; int64, or what fits them until they are widened
    label: Int[Tensor, "*b"]  # −1 where there are no labels


def to_int64(batch: CodeBatch) -> CodeBatch:
    """A batch with codes and labels as int64, on the device that they are on."""
    return CodeBatch(tuple(level.long() for level in batch.codes), batch.label.long())


class CodeStore(Dataset[CodeBatch]):
    """Reads a complete store; safe to hand to worker processes, each of which opens the file for itself."""

    def __init__(self, path: Path, header: CodeHeader) -> None:
        self.path, self.header = path, header
        # The k-th unreadable record stands before every readable one from number (record − k) on.
        self._count = len(header)
        self._scratch: np.ndarray | None = None  # records as they are stored; new pages for every batch cost more
        self._shifts = np.array(header.unreadable, np.int64) - np.arange(len(header.unreadable))

    @classmethod
    def open(cls, path: Path) -> Self:
        """The store at `path`; UserError where it is missing, unfinished or not a code store."""
        store = cls(path, cls.read_header(path))
        if not (store.header.complete and lmdb_store.is_sealed(path)):
            raise UserError(f"{path}: this code store is unfinished; run `vqvae2 extract-codes` again to complete it")
        return store

    @staticmethod
    def read_header(path: Path) -> CodeHeader:
        """What the store at `path` says of itself, complete or not."""
        if not (path / "data.mdb").is_file():
            raise UserError(f"{path}: no code store; make it with `vqvae2 extract-codes`")
        header = lmdb_store.get(lmdb_store.open_reader(path), _HEADER)
        if header is None:
            raise UserError(f"{path}: not a code store (it has no header); delete the folder and extract again")
        return _parse(header, path)

    def __len__(self) -> int:
        return len(self.header)

    def __getitem__(self, key: int | tuple[int, int]) -> CodeBatch:
        batch = to_int64(self.__getitems__([key]))
        return CodeBatch(tuple(level[0] for level in batch.codes), batch.label[0])

    def read(self, indices: Sequence[int]) -> CodeBatch:
        """The codes (B, H_l, W_l) and labels (B,) of these images, int64."""
        return to_int64(self.__getitems__(indices))

    def __getitems__(self, keys: Sequence[Any]) -> CodeBatch:
        """A batch, collated already, not widened yet."""
        indices = [key[0] if isinstance(key, tuple) else key for key in keys]
        dtype = self.header.record_dtype
        size, scratch = dtype.itemsize, self._scratch
        self._scratch = None  # another thread makes its own
        if scratch is None or len(scratch) < len(indices):
            scratch = np.empty(len(indices), dtype)
        batch, target = scratch[: len(indices)], memoryview(scratch.view(np.uint8).data)
        numbers, offsets = np.divmod(self._records(indices), RECORDS_PER_VALUE)
        values, place = lmdb_store.cached_values(self.path), 0
        for number, start in zip(numbers.tolist(), (offsets * size).tolist(), strict=True):
            value = values[number]
            if value is None or len(value) < start + size:
                raise UserError(f"{self.path}: damaged code store (value {number} is missing); delete the folder")
            target[place : place + size] = value[start : start + size]
            place += size
        maps = tuple(
            _tensor(batch[f"level{index}"], level.codebook_size) for index, level in enumerate(self.header.levels)
        )
        labels = torch.from_numpy(batch["label"].copy())
        self._scratch = scratch
        return CodeBatch(maps, labels)

    def image_name(self, index: int) -> str:
        """The name of the image that a record is of, as the data set has it."""
        number, offset = divmod(self._record(index), RECORDS_PER_VALUE)
        names = lmdb_store.get(lmdb_store.open_reader(self.path), _names_key(number)) or b""
        return (names.decode("utf-8", "surrogateescape").split("\0") + [""] * RECORDS_PER_VALUE)[offset]

    def is_mirrored(self, index: int) -> bool:
        """Whether a record is of the mirror image."""
        return self.header.flip and self._record(index) % 2 == 1

    def _record(self, index: int) -> int:
        """Where image `index` stands, counting the unreadable ones before it."""
        return int(self._records([index])[0])

    def _records(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Where images stand, counting the unreadable ones before them."""
        chosen = np.asarray(indices, np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < self._count:
            raise IndexError(f"records {chosen.min()} to {chosen.max()} of {self._count}")
        return chosen + np.searchsorted(self._shifts, chosen, side="right") if len(self._shifts) else chosen


class CodeWriter:
    """Writes a store value by value; what a stopped writer left is kept, and `missing` says what to go on with."""

    def __init__(self, path: Path, header: CodeHeader) -> None:
        self.path, self.header = path, header
        self.environment = lmdb_store.open_writer(path)
        found = lmdb_store.get(self.environment, _HEADER)
        if found is not None and _parse(found, path).identity != header.identity:
            self.environment.close()
            raise UserError(f"{path}: holds the codes of something else; delete the folder and extract again")
        if found is None:
            self._put(_HEADER, header.model_dump_json().encode())

    def missing_values(self) -> list[int]:
        """Numbers of the values that are not there yet; value v holds records [64 v, 64 v + 64)."""
        with self.environment.begin() as transaction:
            total = -(-self.header.count // RECORDS_PER_VALUE)
            return [number for number in range(total) if transaction.get(lmdb_store.encode_key(number)) is None]

    def write(
        self, number: int, codes: Sequence[Int[Tensor, "n h w"]], labels: Int[Tensor, " n"], names: Sequence[str] = ()
    ) -> None:
        """Write one whole value, in a transaction of its own; a label `UNREADABLE_LABEL` leaves a record without codes."""
        records = np.zeros(len(labels), self.header.record_dtype)
        records["label"] = labels.cpu().numpy()
        there = records["label"] != UNREADABLE_LABEL
        for index, level in enumerate(codes):
            records[f"level{index}"][there] = level.cpu().numpy()[there]
        entries = [(lmdb_store.encode_key(number), records.tobytes())]
        if names:
            entries.append((_names_key(number), "\0".join(names).encode("utf-8", "surrogateescape")))
        lmdb_store.put(self.environment, entries)

    def unreadable_records(self) -> list[int]:
        """Records written without codes."""
        record, found = self.header.record_dtype, []
        with self.environment.begin(buffers=True) as transaction:
            for number in range(-(-self.header.count // RECORDS_PER_VALUE)):
                labels = np.frombuffer(transaction.get(lmdb_store.encode_key(number)) or b"", record)["label"]
                found += (np.flatnonzero(labels == UNREADABLE_LABEL) + number * RECORDS_PER_VALUE).tolist()
        return found

    def finish(self) -> None:
        """Mark the store complete, close and seal it."""
        assert not self.missing_values(), "a store is finished when every value is there"
        done = self.header.model_copy(update={"unreadable": tuple(self.unreadable_records()), "complete": True})
        self._put(_HEADER, done.model_dump_json().encode())
        self.close()
        lmdb_store.seal(self.path)

    def close(self) -> None:
        """Close the file; the store can be reopened to go on."""
        self.environment.close()

    def _put(self, key: bytes, value: bytes) -> None:
        lmdb_store.put(self.environment, [(key, value)])


def _tensor(field: np.ndarray, codes: int) -> Tensor:
    """A field of records in the narrowest type that every device converts: torch can do little with uint16."""
    kind = np.uint8 if codes <= 2**8 else np.int16 if codes <= 2**15 else np.int32
    return torch.from_numpy(field.astype(kind))


def _parse(header: bytes, path: Path) -> CodeHeader:
    data = json.loads(header)
    if "autoencoder" not in data:
        raise UserError(f"{path}: not a code store; it holds {data.get('kind', 'something else')}")
    if data.get("format") != _FORMAT:
        raise UserError(
            f"{path}: a code store of format {data.get('format')}, and this version reads {_FORMAT}; "
            "delete the folder and run `vqvae2 extract-codes`"
        )
    return CodeHeader.parse(data, str(path))


def _names_key(number: int) -> bytes:
    return b"names" + lmdb_store.encode_key(number)

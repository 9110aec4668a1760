"""The code store: the code maps of every image, in LMDB, as raw little-endian integers with a JSON header.

Records of fixed size stand `PER_VALUE` together in one LMDB value, so that pages are full; a reader takes slices of the
memory map and copies only the records it was asked for. Nothing is pickled.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import lmdb
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from vqvae2.config import Config
from vqvae2.errors import UserError
from vqvae2.maps import MapSpec

PER_VALUE = 64  # records in one LMDB value
_HEADER = b"header"
_FORMAT = 1
_GROWTH = 64 * 2**20  # bytes by which a full map grows


class CodeHeader(Config):
    """What a code store holds and what it was made from."""

    format: int = _FORMAT
    levels: tuple[MapSpec, ...]  # finest first
    count: int
    classes: tuple[str, ...] = ()  # names of the labels; empty without labels
    split: str
    source: str  # the data set
    autoencoder: str  # digest of the weights that made the codes
    complete: bool = False

    @property
    def record(self) -> np.dtype[Any]:
        """One image's label (−1 for none) and code maps, finest first."""
        maps = [
            (f"level{index}", "u1" if level.codes <= 256 else "<u2" if level.codes <= 65536 else "<u4", level.shape)
            for index, level in enumerate(self.levels)
        ]
        return np.dtype([("label", "<i4"), *maps])

    @property
    def digest(self) -> str:
        """SHA-256 of the header: the same data set, split and autoencoder give the same codes."""
        return hashlib.sha256(self.model_copy(update={"complete": True}).model_dump_json().encode()).hexdigest()

    def check_autoencoder(self, digest: str | None, path: Path) -> None:
        """UserError where the store at `path` was made by other weights than those with this digest."""
        if digest != self.autoencoder:
            raise UserError(
                f"{path}: holds codes of the autoencoder {self.autoencoder[:12]}…, but the run's autoencoder is "
                f"{str(digest)[:12]}…; delete this folder and run `vqvae2 extract-codes`"
            )


class Coded(NamedTuple):
    """The codes of one image or of a batch."""

    codes: tuple[Int[Tensor, "*b h w"], ...]  # int64, finest level first
    label: Int[Tensor, "*b"]  # int64; −1 where there are no labels


class CodeStore(Dataset[Coded]):
    """Reads a complete store; safe to hand to worker processes, each of which opens the file for itself."""

    def __init__(self, path: Path, header: CodeHeader) -> None:
        self.path, self.header = path, header

    @classmethod
    def open(cls, path: Path) -> Self:
        """The store at `path`; UserError where it is missing, unfinished or not a code store."""
        store = cls(path, cls.read_header(path))
        if not store.header.complete:
            raise UserError(f"{path}: this code store is unfinished; run `vqvae2 extract-codes` again to complete it")
        return store

    @staticmethod
    def read_header(path: Path) -> CodeHeader:
        """What the store at `path` says of itself, complete or not."""
        if not (path / "data.mdb").is_file():
            raise UserError(f"{path}: no code store; make it with `vqvae2 extract-codes`")
        with _reader(path).begin() as transaction:
            header = transaction.get(_HEADER)
        if header is None:
            raise UserError(f"{path}: not a code store (it has no header); delete the folder and extract again")
        return CodeHeader.parse(json.loads(header), str(path))

    def __len__(self) -> int:
        return self.header.count

    def __getitem__(self, index: int) -> Coded:
        return self.__getitems__([index])[0]

    def __getitems__(self, keys: Sequence[Any]) -> list[Coded]:
        codes, labels = self.read([key[0] if isinstance(key, tuple) else key for key in keys])
        return [Coded(tuple(level[at] for level in codes), labels[at]) for at in range(len(labels))]

    def read(self, indices: Sequence[int]) -> Coded:
        """The codes (B, H_l, W_l) and labels (B,) of these images."""
        record = self.header.record
        batch = np.empty(len(indices), record)
        with _reader(self.path).begin(buffers=True) as transaction:
            for place, index in enumerate(indices):
                if not 0 <= index < self.header.count:
                    raise IndexError(f"record {index} of {self.header.count}")
                value = transaction.get(_key(index // PER_VALUE))
                offset = index % PER_VALUE * record.itemsize
                if value is None or len(value) < offset + record.itemsize:
                    raise UserError(f"{self.path}: damaged code store (record {index} is missing); delete the folder")
                batch[place] = np.frombuffer(value, record, 1, offset)[0]
        maps = tuple(
            torch.from_numpy(batch[name].astype(np.int64))
            for name in (f"level{index}" for index in range(len(self.header.levels)))
        )
        return Coded(maps, torch.from_numpy(batch["label"].astype(np.int64)))


class CodeWriter:
    """Writes a store value by value; what a stopped writer left is kept, and `missing` says what to go on with."""

    def __init__(self, path: Path, header: CodeHeader) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.header = path, header
        _close_reader(path)
        self.environment = lmdb.open(str(path), map_size=_GROWTH, subdir=True, lock=True, max_readers=512)
        found = self._get(_HEADER)
        if found is not None and CodeHeader.parse(json.loads(found), str(path)) != header:
            self.environment.close()
            raise UserError(f"{path}: holds the codes of something else; delete the folder and extract again")
        self._put(_HEADER, header.model_dump_json().encode())

    def missing(self) -> list[int]:
        """Numbers of the values that are not there yet; value v holds records [64 v, 64 v + 64)."""
        with self.environment.begin() as transaction:
            total = -(-self.header.count // PER_VALUE)
            return [number for number in range(total) if transaction.get(_key(number)) is None]

    def write(self, number: int, codes: Sequence[Int[Tensor, "n h w"]], labels: Int[Tensor, " n"]) -> None:
        """Write one whole value, in a transaction of its own."""
        records = np.empty(len(labels), self.header.record)
        records["label"] = labels.cpu().numpy()
        for index, level in enumerate(codes):
            records[f"level{index}"] = level.cpu().numpy()
        self._put(_key(number), records.tobytes())

    def finish(self) -> None:
        """Mark the store complete and close it."""
        assert not self.missing(), "a store is finished when every value is there"
        self._put(_HEADER, self.header.model_copy(update={"complete": True}).model_dump_json().encode())
        self.close()

    def close(self) -> None:
        """Close the file; the store can be reopened to go on."""
        self.environment.close()

    def _get(self, key: bytes) -> bytes | None:
        with self.environment.begin() as transaction:
            return transaction.get(key)

    def _put(self, key: bytes, value: bytes) -> None:
        while True:
            try:
                with self.environment.begin(write=True) as transaction:
                    transaction.put(key, value)
                return
            except lmdb.MapFullError:
                self.environment.set_mapsize(self.environment.info()["map_size"] + max(_GROWTH, 2 * len(value)))
            except lmdb.MapResizedError:  # another process has grown it
                self.environment.set_mapsize(0)


# LMDB wants a file opened once in a process, and anew in a forked one: by path, the process and its environment.
_readers: dict[Path, tuple[int, lmdb.Environment]] = {}


def _reader(path: Path) -> lmdb.Environment:
    """This process's handle for reading the store at `path`."""
    path = path.absolute()
    process, environment = _readers.get(path, (0, None))
    if environment is None or process != os.getpid():
        _close_reader(path)
        try:
            environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, max_readers=512)
        except lmdb.Error as error:
            raise UserError(f"{path}: damaged code store ({error}); delete the folder and extract again") from None
        _readers[path] = (os.getpid(), environment)
    return environment


def _close_reader(path: Path) -> None:
    _, environment = _readers.pop(path.absolute(), (0, None))
    if environment is not None:
        environment.close()


def _key(number: int) -> bytes:
    return number.to_bytes(8, "big")

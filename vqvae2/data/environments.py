"""LMDB as this project uses it: one reader a process and file, and writers whose map grows when it is full."""

import os
from collections.abc import Iterable
from pathlib import Path

import lmdb

from vqvae2.errors import UserError

_GROWTH = 64 * 2**20  # bytes by which a full map grows

# LMDB wants a file opened once in a process, and anew in a forked one: by path, the process and its environment.
_readers: dict[Path, tuple[int, lmdb.Environment]] = {}


def reader(path: Path, kind: str = "code store; delete the folder and extract again") -> lmdb.Environment:
    """This process's handle for reading the database at `path`; UserError where it is no database."""
    path = path.absolute()
    process, environment = _readers.get(path, (0, None))
    if environment is None or process != os.getpid():
        close_reader(path)
        what, mend = kind.split("; ", 1)
        try:
            environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, max_readers=512)
        except lmdb.Error as error:
            raise UserError(f"{path}: damaged {what} ({error}); {mend}") from None
        _readers[path] = (os.getpid(), environment)
    return environment


def close_reader(path: Path) -> None:
    """Close this process's handle for reading, before writing."""
    _, environment = _readers.pop(path.absolute(), (0, None))
    if environment is not None:
        environment.close()


def writer(path: Path) -> lmdb.Environment:
    """A handle for writing; the folder is made where it is missing."""
    path.mkdir(parents=True, exist_ok=True)
    close_reader(path)
    return lmdb.open(str(path), map_size=_GROWTH, subdir=True, lock=True, max_readers=512)


def get(environment: lmdb.Environment, key: bytes) -> bytes | None:
    """A copy of one value."""
    with environment.begin() as transaction:
        return transaction.get(key)


def put(environment: lmdb.Environment, entries: Iterable[tuple[bytes, bytes]]) -> None:
    """Write entries in one transaction: after a crash all are there or none."""
    entries = list(entries)
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in entries:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            needed = 2 * sum(len(value) for _, value in entries)
            environment.set_mapsize(environment.info()["map_size"] + max(_GROWTH, needed))
        except lmdb.MapResizedError:  # another process has grown it
            environment.set_mapsize(0)

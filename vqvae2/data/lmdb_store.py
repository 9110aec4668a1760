"""LMDB as this project uses it: one reader a process and file, writers whose map grows when it is full, and seals.

LMDB trusts its file: a damaged page can give other records, or end the process. So a finished database is sealed:
beside it lies the digest of its bytes. A reader compares size and modification time, as make does, and recomputes the
digest where they differ.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import lmdb

from vqvae2 import files
from vqvae2.errors import UserError

KEY_BYTES = 8
_GROWTH = 64 * 2**20  # bytes by which a full map grows


class Views(dict[int, "memoryview | None"]):
    """Values by number, each a view of the memory map that is looked up once; None where there is no such value.

    Never kept by a caller: closing the reader takes away the memory that they show.
    """

    def __init__(self, environment: lmdb.Environment) -> None:
        super().__init__()
        self._environment = environment
        self._transaction: lmdb.Transaction | None = None

    def __missing__(self, number: int) -> memoryview | None:
        if self._transaction is None:
            self._transaction = self._environment.begin(buffers=True)
        value: Any = self._transaction.get(encode_key(number))
        return self.setdefault(number, value)


class _Reader(NamedTuple):
    process: int
    environment: lmdb.Environment
    views: Views


# LMDB wants a file opened once in a process, and anew in a forked one.
_readers: dict[Path, _Reader] = {}


def encode_key(number: int) -> bytes:
    """The key of a value that has a number: values lie in the order of their numbers."""
    return number.to_bytes(KEY_BYTES, "big")


def cached_values(path: Path) -> Views:
    """The numbered values of the finished code store at `path`."""
    open_reader(path)
    return _readers[path.absolute()].views


def open_reader(path: Path, kind: str = "code store; delete the folder and extract again") -> lmdb.Environment:
    """This process's handle for reading the database at `path`; UserError where it is no database, or damaged."""
    path = path.absolute()
    found = _readers.get(path)
    if found is None or found.process != os.getpid():
        close_reader(path)
        what, mend = kind.split("; ", 1)
        try:
            _check_seal(path)
            environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, max_readers=512)
            _check_length(path, environment)
        except (lmdb.Error, ValueError) as error:
            raise UserError(f"{path}: damaged {what} ({error}); {mend}") from None
        found = _readers[path] = _Reader(os.getpid(), environment, Views(environment))
    return found.environment


def close_reader(path: Path) -> None:
    """Close this process's handle for reading, before writing."""
    found = _readers.pop(path.absolute(), None)
    if found is not None:
        found.views.clear()
        found.environment.close()


def open_writer(path: Path) -> lmdb.Environment:
    """A handle for writing; the folder is made where it is missing."""
    path.mkdir(parents=True, exist_ok=True)
    close_reader(path)
    with _explained(path):
        _check_seal(path)
        return lmdb.open(str(path), map_size=_GROWTH, subdir=True, lock=True, max_readers=512)


def get(environment: lmdb.Environment, key: bytes) -> bytes | None:
    """A copy of one value."""
    with environment.begin() as transaction:
        return transaction.get(key)


def put(environment: lmdb.Environment, entries: Iterable[tuple[bytes, bytes]]) -> None:
    """Write entries in one transaction: after a crash, or with a full disk, all are there or none."""
    entries, path = list(entries), Path(environment.path())
    _seal(path).unlink(missing_ok=True)
    while True:
        try:
            with _explained(path), environment.begin(write=True) as transaction:
                for key, value in entries:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            needed = 2 * sum(len(value) for _, value in entries)
            environment.set_mapsize(environment.info()["map_size"] + max(_GROWTH, needed))
        except lmdb.MapResizedError:  # another process has grown it
            environment.set_mapsize(0)


def exists(path: Path) -> bool:
    """Whether a database with anything in it is at `path`; a killed writer may leave an empty one, as good as none."""
    data = _data(path)
    return data.is_file() and data.stat().st_size > 0 and open_reader(path).stat()["entries"] > 0


def seal(path: Path) -> None:
    """Keep the digest of a finished, closed database beside it."""
    _write_seal(path, files.digest(_data(path)))


def is_sealed(path: Path) -> bool:
    """Whether the database at `path` was finished, and not written to since."""
    return _seal(path).is_file()


def _check_seal(path: Path) -> None:
    """ValueError where the bytes are not those that were sealed; nothing is known of a database without a seal."""
    if not (is_sealed(path) and _data(path).is_file()):
        return
    known, status = files.read_json(_seal(path)), _data(path).stat()
    if not (isinstance(known, dict) and known.keys() == {"sha256", "size", "modified"}):
        raise ValueError(f"{_seal(path).name} is not what was written")
    if [known["size"], known["modified"]] == [status.st_size, status.st_mtime_ns]:
        return
    if files.digest(_data(path)) != known["sha256"]:
        raise ValueError("its contents are not those that were written")
    with suppress(OSError):  # a folder that may only be read is checked each time
        _write_seal(path, known["sha256"])  # a copy has a time of its own


def _write_seal(path: Path, digest: str) -> None:
    status = _data(path).stat()
    files.write_json(_seal(path), {"sha256": digest, "size": status.st_size, "modified": status.st_mtime_ns})


def _check_length(path: Path, environment: lmdb.Environment) -> None:
    """ValueError where the file ends before its last page: to read that would end the process."""
    pages = environment.info()["last_pgno"] + 1
    if _data(path).stat().st_size < pages * environment.stat()["psize"]:
        raise ValueError("the file is cut short")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what LMDB says of disks and files into a UserError."""
    try:
        yield
    except (lmdb.MapFullError, lmdb.MapResizedError):
        raise
    except (lmdb.Error, ValueError) as error:
        raise UserError(
            f"{path}: cannot be written ({error}); what was written before is kept: make room, or permission, "
            "and run the same command again"
        ) from None


def _data(path: Path) -> Path:
    return path / "data.mdb"


def _seal(path: Path) -> Path:
    return path / "seal.json"

"""LMDB databases with one reader per process and file, writers that grow the map when it is full, and checksums.

LMDB does not verify its file: a corrupted page can return wrong records or crash the process. A finished database is
therefore sealed with the SHA-256 of its file in `seal.json`. A reader compares size and modification time with the
seal, and recomputes the checksum if they differ.
"""

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import lmdb

from vqvae2 import files
from vqvae2.config import Config
from vqvae2.errors import UserError

KEY_BYTES = 8
_GROWTH = 64 * 2**20  # bytes by which a full map grows
LOCK_FILE = "lock.mdb"
_MAX_READERS = 512
_LOCK_BYTES = 64 * _MAX_READERS + 4096  # LMDB uses 64 bytes per reader, and a header


class _Seal(Config):
    """Contents of seal.json."""

    sha256: str
    size: int  # bytes of the file
    modified: int  # its modification time in nanoseconds


class ValueCache(dict[int, "memoryview | None"]):
    """Values by number, as cached views of the memory map. A missing value is None.

    Callers must not keep views: they become invalid when the reader is closed.
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
    pid: int
    file: tuple[int, ...] | None  # see `_file_identity`
    environment: lmdb.Environment
    values: ValueCache

    def is_current(self, path: Path) -> bool:
        """Return whether this process opened the file that is now at `path`."""
        return self.pid == os.getpid() and self.file == _file_identity(path)


# LMDB requires that a process opens a file only once, and that a forked process opens it again.
_readers: dict[Path, _Reader] = {}


def encode_key(number: int) -> bytes:
    """Return the key of a numbered value. Keys sort in numerical order."""
    return number.to_bytes(KEY_BYTES, "big")


def cached_values(path: Path) -> ValueCache:
    """Return the numbered values of the finished code store at `path`."""
    open_reader(path)
    return _readers[path.resolve()].values


def open_reader(
    path: Path, kind: str = "code store", fix: str = "Delete the folder and run `vqvae2 extract-codes`."
) -> lmdb.Environment:
    """Return this process's read-only environment of the database at `path`. Errors name its `kind` and the `fix`.

    Raises:
        UserError: If there is no database, or it is corrupted.
    """
    path = path.resolve()  # LMDB refuses to open a database twice, also through a link
    reader = _readers.get(path)
    if reader is None or not reader.is_current(path):
        # Also readers of other files that are gone or inherited by a fork: lmdb refuses a new file with their inode.
        for opened in [each for each, other in _readers.items() if not other.is_current(each)]:
            close_reader(opened)
        try:
            _verify_seal(path)
            file = _file_identity(path)
            environment = lmdb.open(str(path), readonly=True, lock=False, readahead=False, max_readers=_MAX_READERS)
            try:
                _check_length(path, environment)
            except ValueError:
                environment.close()
                raise
        except UserError:
            raise
        except (lmdb.Error, ValueError) as error:
            raise UserError(f"{path}: corrupted {kind} ({error}). {fix}") from None
        reader = _readers[path] = _Reader(os.getpid(), file, environment, ValueCache(environment))
    return reader.environment


def close_reader(path: Path) -> None:
    """Close this process's reader of the database at `path`, if open."""
    reader = _readers.pop(path.resolve(), None)
    if reader is not None:
        reader.values.clear()
        reader.environment.close()


def open_writer(path: Path) -> lmdb.Environment:
    """Return an environment for writing to the database at `path`. The folder is created if missing.

    Raises:
        UserError: If the database cannot be opened or is corrupted.
    """
    path.mkdir(parents=True, exist_ok=True)
    close_reader(path)
    with _write_errors(path):
        _verify_seal(path)
        if _data_file(path).is_file() and not _is_initialized(path) and not is_sealed(path):
            _data_file(path).unlink()  # the disk was full when it was created
        _allocate_lock_file(path)
        return lmdb.open(str(path), map_size=_GROWTH, subdir=True, lock=True, max_readers=_MAX_READERS)


def _allocate_lock_file(path: Path) -> None:
    """Allocate the file of LMDB's locks. LMDB maps a sparse one, and writing to it on a full disk kills the process."""
    with (path / LOCK_FILE).open("ab") as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, _LOCK_BYTES)


def get(environment: lmdb.Environment, key: bytes) -> bytes | None:
    """Return a copy of one value, None if it does not exist."""
    with environment.begin() as transaction:
        return transaction.get(key)


def put(environment: lmdb.Environment, entries: Iterable[tuple[bytes, bytes]]) -> None:
    """Write entries in one transaction: after a crash or a full disk, either all or none are stored.

    Raises:
        UserError: If the entries cannot be written.
    """
    entries, path = list(entries), Path(environment.path())
    _seal_file(path).unlink(missing_ok=True)
    while True:
        try:
            with _write_errors(path), environment.begin(write=True) as transaction:
                for key, value in entries:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            needed = 2 * sum(len(value) for _, value in entries)
            environment.set_mapsize(environment.info()["map_size"] + max(_GROWTH, needed))
        except lmdb.MapResizedError:  # another process has grown the map
            environment.set_mapsize(0)


def exists(path: Path) -> bool:
    """Return whether there is a database with entries at `path`. A killed writer can leave one without entries."""
    return _is_initialized(path) and open_reader(path).stat()["entries"] > 0


def _is_initialized(path: Path) -> bool:
    """Return whether the file has its first two pages, without which it is not a database."""
    data = _data_file(path)
    return data.is_file() and data.stat().st_size >= 2 * mmap.PAGESIZE


def seal(path: Path) -> None:
    """Store the checksum of a finished and closed database."""
    _write_seal(path, files.digest(_data_file(path)))


def is_sealed(path: Path) -> bool:
    """Return whether the database at `path` was sealed and has not been written to since."""
    return _seal_file(path).is_file()


def _verify_seal(path: Path) -> None:
    """Raise ValueError if a sealed database has changed. A database without a seal is not checked."""
    if not (is_sealed(path) and _data_file(path).is_file()):
        return
    known = _Seal.from_json(_seal_file(path), "Delete the folder and run the command that writes it again.")
    status = _data_file(path).stat()
    if (known.size, known.modified) == (status.st_size, status.st_mtime_ns):
        return
    if files.digest(_data_file(path)) != known.sha256:
        raise ValueError("checksum mismatch")
    with suppress(OSError):  # in a read-only folder, the checksum is recomputed each time
        _write_seal(path, known.sha256)  # a copy has another modification time


def _write_seal(path: Path, digest: str) -> None:
    status = _data_file(path).stat()
    seal = _Seal(sha256=digest, size=status.st_size, modified=status.st_mtime_ns)
    files.write_json(_seal_file(path), seal.to_dict())


def _check_length(path: Path, environment: lmdb.Environment) -> None:
    """Raise ValueError if the file ends before its last page: reading that page would crash the process."""
    pages = environment.info()["last_pgno"] + 1
    if _data_file(path).stat().st_size < pages * environment.stat()["psize"]:
        raise ValueError("truncated file")


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Convert errors other than a full map to UserErrors."""
    try:
        yield
    except (lmdb.MapFullError, lmdb.MapResizedError, UserError):
        raise
    except (lmdb.Error, ValueError, OSError) as error:
        raise UserError(
            f"{path}: cannot write ({error}). Free disk space or fix permissions, then run the same command again; "
            "completed work is kept."
        ) from None


def _file_identity(path: Path) -> tuple[int, ...] | None:
    """Return values that differ after another process has made the database again; None if it has no file."""
    try:
        status = _data_file(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _data_file(path: Path) -> Path:
    return path / "data.mdb"


def _seal_file(path: Path) -> Path:
    return path / "seal.json"

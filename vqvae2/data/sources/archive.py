"""Random access to .zip and .tar archives: a member is one read at an offset, without a lock.

An archive is a local file or an fsspec URL such as `s3://bucket/train.tar`. A remote read is one range request, and
nothing is cached locally. See docs/scale.md for why shards are not streamed sequentially.
"""

import os
import time
from pathlib import Path
from typing import IO, Any

from fsspec.core import url_to_fs

from vqvae2 import files
from vqvae2.errors import UserError

_ATTEMPTS, _PAUSE_S = 4, 0.5  # per remote request; the pause doubles after each attempt
_SCAN_BLOCK_BYTES = 16 * 2**20  # request size while an archive is scanned from start to end
_VERSION_FIELDS = (
    "size",
    "ETag",
    "etag",
    "mtime",
    "LastModified",
    "created",
    "updated",
    "md5",
)  # of fsspec file information


class RangeReader:
    """Reader of byte ranges of a file. Each process opens the file at its first read; pickling closes it.

    With `keep_open=False` the file is opened for each read, because the number of open files is limited.
    """

    def __init__(self, path: str, keep_open: bool = True) -> None:
        self.path, self.keep_open = path, keep_open
        self._descriptor: int | None = None

    def __call__(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`, fewer at the end of the file.

        Raises:
            UserError: If the archive cannot be read.
        """
        if is_remote(self.path):
            return _request_range(self.path, offset, length)
        try:
            return self._read_local(offset, length)
        except OSError as error:  # without the name of the file
            raise _unreachable(self.path, error) from None
        finally:
            if not self.keep_open:
                self.close()

    def _read_local(self, offset: int, length: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        # A corrupted archive can declare any length, and `pread` allocates it.
        length = min(length, os.fstat(self._descriptor).st_size - offset) if offset >= 0 else 0
        parts = []
        while length > 0:
            part = os.pread(self._descriptor, length, offset)
            if not part:
                break
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close the file, if open."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __reduce__(self) -> tuple[type["RangeReader"], tuple[str, bool]]:
        return type(self), (self.path, self.keep_open)

    def __del__(self) -> None:
        self.close()


def is_remote(path: str) -> bool:
    """Return whether a path is a URL."""
    return "://" in path


def open_archive(path: str) -> IO[bytes]:
    """Open an archive for reading.

    Raises:
        UserError: If it is missing or unreadable.
    """
    try:
        if is_remote(path):
            system, inner = url_to_fs(path)
            return system.open(inner, "rb", block_size=_SCAN_BLOCK_BYTES)
        files.require_file(Path(path), f"data.path: {path}", "Give an archive.")
        return Path(path).open("rb")
    except UserError:
        raise
    except Exception as error:  # every fsspec file system has its own exceptions
        raise _unreachable(path, error) from None


def archive_stamp(paths: list[str]) -> dict[str, Any]:
    """Return a stamp of archives: sizes and modification times, or what a remote file system offers instead."""
    return {"archives": {_absolute(path): _version(path) for path in paths}}


def _absolute(path: str) -> str:
    return path if is_remote(path) else str(Path(path).resolve())


def _version(path: str) -> list[Any]:
    try:
        if is_remote(path):
            system, inner = url_to_fs(path)
            info = system.info(inner)
            return [str(info[name]) for name in _VERSION_FIELDS if name in info]
        status = Path(path).stat()
    except Exception as error:
        raise _unreachable(path, error) from None
    return [status.st_size, status.st_mtime_ns]


def _request_range(path: str, offset: int, length: int) -> bytes:
    """Read a range of a remote file, with retries on network errors."""
    for attempt in range(_ATTEMPTS):
        try:
            system, inner = url_to_fs(path)  # cached by fsspec in each process
            return system.cat_file(inner, start=offset, end=offset + length)
        except Exception as error:
            if isinstance(error, FileNotFoundError | PermissionError | ImportError) or attempt == _ATTEMPTS - 1:
                raise _unreachable(path, error) from None
            time.sleep(_PAUSE_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _unreachable(path: str, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"data.path: no such archive: {path}. Check the path.")
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"data.path: cannot read {path} ({reason}). Run the same command again to resume.")

"""Archives read in place, what .zip and .tar have in common: a member is one read at an offset, without a lock.

An archive is a local file or an address that fsspec knows, such as `s3://bucket/train.tar`: then a read is one request
for a range of bytes, and nothing is kept on this machine. See docs/scale.md for why members are not streamed in the
order of their shards.
"""

import os
import time
from pathlib import Path
from typing import IO, Any

from fsspec.core import url_to_fs

from vqvae2.errors import UserError

_ATTEMPTS, _PAUSE_S = 4, 0.5  # of a request over a network; the pause doubles each time
_BLOCK = 16 * 2**20  # bytes of a request while an archive is looked through from its beginning to its end
_TELLS = ("size", "ETag", "etag", "mtime", "LastModified", "created", "updated", "md5")  # that a file was changed


class ReadAt:
    """A file that is read at offsets, from any process: opened where it is first needed, never pickled open."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor: int | None = None

    def __call__(self, offset: int, length: int) -> bytes:
        """The `length` bytes at `offset`; fewer where the file ends."""
        if is_remote(self.path):
            return _request(self.path, offset, length)
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        parts = []
        while length > 0:
            part = os.pread(self._descriptor, length, offset)
            if not part:
                break
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def __reduce__(self) -> tuple[type["ReadAt"], tuple[str]]:
        return type(self), (self.path,)

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def is_remote(path: str) -> bool:
    """Whether a path is an address."""
    return "://" in path


def open_archive(path: str) -> IO[bytes]:
    """An archive, open for reading; UserError where there is none."""
    try:
        if is_remote(path):
            system, inner = url_to_fs(path)
            return system.open(inner, "rb", block_size=_BLOCK)
        return Path(path).open("rb")
    except Exception as error:  # each file system has errors of its own
        raise _unreachable(path, error) from None


def state(paths: list[str]) -> dict[str, Any]:
    """The stamp of archives: their sizes and modification times, as make and rsync compare files."""
    return {"archives": {_name(path): _state(path) for path in paths}}


def _name(path: str) -> str:
    return path if is_remote(path) else str(Path(path).resolve())


def _state(path: str) -> list[Any]:
    try:
        if is_remote(path):
            system, inner = url_to_fs(path)
            known = system.info(inner)
            return [str(known[name]) for name in _TELLS if name in known]
        status = Path(path).stat()
    except Exception as error:
        raise _unreachable(path, error) from None
    return [status.st_size, status.st_mtime_ns]


def _request(path: str, offset: int, length: int) -> bytes:
    """A range of a remote file, asked for again where the network fails."""
    for attempt in range(_ATTEMPTS):
        try:
            system, inner = url_to_fs(path)  # kept by fsspec, one for each process
            return system.cat_file(inner, start=offset, end=offset + length)
        except Exception as error:
            if isinstance(error, FileNotFoundError | PermissionError | ImportError) or attempt == _ATTEMPTS - 1:
                raise _unreachable(path, error) from None
            time.sleep(_PAUSE_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _unreachable(path: str, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"data.path: {path} is missing; give an archive that exists")
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"data.path: {path} cannot be read ({reason}); the same command goes on once it can be")

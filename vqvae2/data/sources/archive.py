"""Archives read in place, what .zip and .tar have in common: a member is one read at an offset, without a lock."""

import os
from pathlib import Path
from typing import Any

from vqvae2.errors import UserError


class ReadAt:
    """A file that is read at offsets, from any process: opened where it is first needed, never pickled open."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor: int | None = None

    def __call__(self, offset: int, length: int) -> bytes:
        """The `length` bytes at `offset`; fewer where the file ends."""
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


def state(paths: list[str]) -> dict[str, Any]:
    """The stamp of archives: their sizes and modification times, as make and rsync compare files."""
    found = {}
    for path in paths:
        try:
            status = Path(path).stat()
        except FileNotFoundError:
            raise UserError(f"data.path: {path} is missing; give an archive that exists") from None
        found[str(Path(path).resolve())] = [status.st_size, status.st_mtime_ns]
    return {"archives": found}

"""Writing files so that each is complete or absent, and telling files apart by digest."""

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqvae2.errors import UserError

_HOST = re.sub(r"[^\w-]", "-", socket.gethostname())
_PARTIAL = re.compile(r"\..*\.([\w-]+)\.(\d+)\.partial")
_swept: set[Path] = set()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; move what was written there onto `path` when the block ends well.

    The block may create a file or a folder. A crash at any moment leaves the old `path` or the new one, never a part;
    only a folder that takes the place of another may be missing then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    partial = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.partial")  # two processes are kept apart
    try:
        yield partial
        _flush_all(partial)
        if partial.is_dir() and path.exists():
            _remove(path)  # a folder cannot be renamed onto one that has files
        partial.replace(path)
        _flush(path.parent)
    finally:
        _remove(partial)


def _sweep(folder: Path) -> None:
    """Remove what killed processes of this machine have left half written in a folder; once a process and folder."""
    if folder in _swept:
        return
    _swept.add(folder)
    for found in folder.glob(".*.partial"):
        match = _PARTIAL.fullmatch(found.name)
        if match and match[1] == _HOST and not _is_alive(int(match[2])):
            _remove(found)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # someone else's
    return True


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically, as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`; UserError where the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it and make it again") from None


def read_log(path: Path) -> list[dict[str, float]]:
    """The entries of a log, in order: lines of JSON, each numbers by name, `step` among them.

    A line that a killed process has left half written, or that is damaged, is passed over.
    """
    return [entry for line in path.read_bytes().splitlines() if (entry := _entry(line)) is not None]


def _entry(line: bytes) -> dict[str, float] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return None
    return entry if all(isinstance(value, int | float) for value in entry.values()) else None


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_all(path: Path) -> None:
    """Flush a file, or a folder with everything in it."""
    if path.is_dir():
        for child in path.iterdir():
            _flush_all(child)
    _flush(path)


def _flush(path: Path) -> None:
    """Ask the operating system to put a file, or a folder's list of files, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

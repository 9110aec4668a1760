"""Atomic file writes, JSON files, append-only logs and checksums."""

import atexit
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from vqvae2.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Everything before the name, in an absolute path or an address, also in one that a name such as `videos:` precedes.
_FOLDERS = re.compile(r"(?:^|(?<=:))(?:[\w+.-]+:/)?~?/(?:.*/)?(?=.)")
_HOST = re.sub(r"[^\w-]", "-", socket.gethostname())
_PARTIAL = re.compile(r"\..*\.([\w-]+)\.(\d+)\.partial")
_cleaned: set[Path] = set()
_LOCK_NAME = ".lock"
_locks: dict[Path, IO[str]] = {}


def require_file(path: Path, name: str = "", fix: str = "Check the path.") -> None:
    """Check that `path` is a regular file. Reading a pipe can block forever, and a device has no end.

    Errors start with `name`, the path by default, and end with `fix`.

    Raises:
        UserError: If there is no file, or it is not a regular one.
    """
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "not a regular file" if path.exists() else "no such file"
        raise UserError(f"{name or path}: {problem}. {fix}".rstrip())


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and move it to `path` if the block succeeds.

    The block may create a file or a folder. After a crash at any moment `path` is either the old or the new version.
    The one exception: a folder that replaces an existing folder may be missing.

    Raises:
        UserError: If the block creates a file, and `path` is a folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean_up_partials(path.parent)
    # Host and process ID keep concurrent writers apart.
    partial = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.partial")
    try:
        with named_errors(path):
            yield partial
            _fsync_tree(partial)
            if partial.is_dir() and path.exists():
                _remove(path)  # a folder cannot replace a non-empty folder
            elif path.is_dir():
                raise UserError(f"{path}: is a folder, and a file must be written there. Move or delete it.")
            partial.replace(path)
            _fsync(path.parent)
    finally:
        _remove(partial)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Name `path` in an OSError that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def _clean_up_partials(folder: Path) -> None:
    """Remove temporary files that dead processes of this host left in a folder. Runs once per process and folder."""
    if folder in _cleaned:
        return
    _cleaned.add(folder)
    for found in folder.glob(".*.partial"):
        match = _PARTIAL.fullmatch(found.name)
        if match and match[1] == _HOST and not _is_alive(int(match[2])):
            _remove(found)


def is_leftover(name: str) -> bool:
    """Return whether a file name is that of a lock or of a temporary file, which a killed command can leave."""
    return name == _LOCK_NAME or _PARTIAL.fullmatch(name) is not None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, owned by another user
    return True


def lock_folder(folder: Path, shared: bool = False) -> None:
    """Reserve a folder for this process until `release_locks` or the end of the process.

    Args:
        shared: Whether other processes may reserve it too, if theirs is also shared.

    Raises:
        UserError: If another process has reserved the folder. The message names it.
    """
    path = (folder / _LOCK_NAME).absolute()
    if fcntl is None or path in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        # A POSIX lock, because it is not inherited by worker processes, which may outlive a killed command.
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(f"{folder}: in use by {owner}. Wait until it has finished, or use another folder.") from None
    except OSError:  # a file system without locks
        file.close()
        return
    if os.fstat(file.fileno()).st_nlink == 0:  # its owner has just released the folder, and removed the file
        file.close()
        lock_folder(folder, shared)
        return
    _locks[path] = file
    with named_errors(path):
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} on {_HOST}".encode())


@atexit.register
def release_locks() -> None:
    """Release every folder that `lock_folder` reserved."""
    while _locks:
        path, file = _locks.popitem()
        assert fcntl is not None
        with suppress(BlockingIOError, PermissionError):  # another process shares it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        file.close()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, fix: str = "Delete it and rerun the command that writes it.") -> Any:
    """Return the JSON value in `path`. Use `Config.from_json` for a file with known keys.

    Raises:
        UserError: If the file is missing or is not valid JSON. The message ends with `fix`.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    return parse_json(content, path, fix)


def parse_json(content: bytes, source: object, fix: str) -> Any:
    """Return the JSON value in UTF-8 text.

    Raises:
        UserError: If it is not valid JSON, or an object has a key twice. The message starts with `source` and ends with
            `fix`.
    """
    try:
        return json.loads(content.decode(), object_pairs_hook=_unique_keys)
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # includes errors of decoding and integers with too many digits
        reason = str(error)
    raise UserError(f"{source}: not valid JSON ({reason}). {fix}")


def without_folders(value: Any) -> Any:
    """Return a JSON value whose absolute paths and addresses are replaced by the names at their ends.

    Folders of a computer are private, and mean nothing elsewhere.

    >>> without_folders({"data": "/private/photos", "sources": ["videos:~/clips", "s3://bucket/a.tar"]})
    {'data': 'photos', 'sources': ['videos:clips', 'a.tar']}
    >>> without_folders(["scenes", "huggingface:owner/name", "torchvision:CIFAR10:/data", 3])
    ['scenes', 'huggingface:owner/name', 'torchvision:CIFAR10:data', 3]
    """
    if isinstance(value, dict):
        return {name: without_folders(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(each) for each in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the entries of a JSON Lines log in file order: numbers by name, including `step`.

    Truncated or corrupted lines are skipped.
    """
    return [entry for line in path.read_bytes().splitlines() if (entry := _parse_entry(line)) is not None]


def _parse_entry(line: bytes) -> dict[str, float] | None:
    try:
        entry = parse_json(line, "", "")
    except UserError:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return None
    # Not `isinstance`, because Booleans are integers. Larger integers do not fit into a float.
    valid = all(type(value) is float or (type(value) is int and abs(value) < 2**53) for value in entry.values())
    return entry if valid and entry["step"] >= 0 else None


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _fsync_tree(child)
    _fsync(path)


def _fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
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

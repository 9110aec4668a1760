"""A folder of image files, including subfolders."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vqvae2.config import is_resolved
from vqvae2.data.image_io import UnreadableImageError
from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.base import Source, is_image, require_images, warn_skipped
from vqvae2.errors import UserError

# File systems have a limited time resolution: a folder that changed this recently can change again unnoticed.
_TIME_RESOLUTION_NS = 2 * 10**9


class FolderSource(Source):
    """All images in a folder and its subfolders, named by their relative paths with `/`.

    Links are followed, but each folder is scanned only once. Hidden folders, run folders and folders of samples are
    skipped.

    The index is stale if the modification time of a folder has changed, which happens when a file or subfolder is
    added, removed or renamed. Overwriting a file does not change the index. Changes are missed on file systems without
    modification times.
    """

    @classmethod
    def matches(cls, path: str) -> bool:
        del path
        return True  # last in `SOURCES`

    @classmethod
    def scan(cls, path: str) -> ImageIndex:
        root = Path(path)
        if not root.is_dir():
            problem = "not a folder or archive" if root.exists() else "no such folder"
            raise UserError(
                f"data.path: {problem}: {path}. Give a folder of images, a .zip or .tar archive, or `scenes`."
            )
        names: list[str] = []
        folders: dict[str, int] = {}
        started = time.time_ns()
        skipped: list[str] = []
        for folder in walk_folders(root, _is_output):
            relative = os.path.relpath(folder.path, path).replace(os.sep, "/")
            # −1 equals no modification time, so that the next command scans again.
            folders[relative] = folder.changed if folder.changed < started - _TIME_RESOLUTION_NS else -1
            prefix = "" if relative == "." else relative + "/"
            names += [prefix + name for name in folder.files if is_image(name)]
            skipped += [name for name in folder.files if not is_image(name)]
        require_images(names, path)
        warn_skipped(skipped, path)
        return ImageIndex.build(names, stamp={"root": str(root.resolve()), "folders": folders})

    @classmethod
    def is_unchanged(cls, path: str, stamp: dict[str, Any]) -> bool:
        if stamp.get("root") != str(Path(path).resolve()):
            return False
        try:
            return all(Path(path, name).stat().st_mtime_ns == changed for name, changed in stamp["folders"].items())
        except OSError:
            return False

    def open(self, number: int, size: tuple[int, int]) -> Path:
        del size
        path = Path(self.path, self.index.names[number])
        if not path.is_file():  # a dangling link, or a pipe, which would block
            raise UnreadableImageError(path, "not a regular file")
        return path


class FolderContents(NamedTuple):
    """A folder that `walk_folders` visited."""

    path: Path
    changed: int  # modification time in nanoseconds
    files: list[str]  # names


def walk_folders(root: Path, skip: Callable[[Path], bool] = lambda folder: False) -> Iterator[FolderContents]:
    """Yield a folder and its subfolders, sorted, each once. Links are followed, hidden folders are skipped.

    Raises:
        UserError: If a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, found in os.walk(root, followlinks=True, onerror=_raise_unreadable):
        path = Path(folder)
        status = path.stat()
        if (status.st_dev, status.st_ino) in seen or skip(path):
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield FolderContents(path, status.st_mtime_ns, found)


def _raise_unreadable(error: OSError) -> None:
    raise UserError(f"data.path: {error.filename}: {error.strerror}. Check its permissions, or move it elsewhere.")


def _is_output(folder: Path) -> bool:
    """Return whether a folder is a run folder or holds samples, which are not training images."""
    is_samples = (folder / "manifest.json").is_file() and (folder / "images").is_dir()
    return is_samples or is_resolved(folder / "config.yaml")

"""A folder of image files, including subfolders."""

import os
import time
from pathlib import Path
from typing import Any

from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.base import Source, is_image, require_images
from vqvae2.errors import UserError

# File systems have a limited time resolution: a folder that changed this recently can change again unnoticed.
_TIME_RESOLUTION_NS = 2 * 10**9


class FolderSource(Source):
    """All images in a folder and its subfolders, named by their relative paths with `/`. Links are followed.

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
        for folder, _, found in os.walk(path, followlinks=True):
            relative = os.path.relpath(folder, path).replace(os.sep, "/")
            changed = Path(folder).stat().st_mtime_ns
            # −1 equals no modification time, so that the next command scans again.
            folders[relative] = changed if changed < started - _TIME_RESOLUTION_NS else -1
            prefix = "" if relative == "." else relative + "/"
            names += [prefix + name for name in found if is_image(name)]
        require_images(names, path)
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
        return Path(self.path, self.index.names[number])

"""A folder of image files, however deep."""

import os
import time
from pathlib import Path
from typing import Any

from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.base import Source, is_image, require
from vqvae2.errors import UserError

# Times in a file system tick in steps; a folder changed this shortly before a scan may change again unseen.
_TICK = 2 * 10**9  # nanoseconds


class FolderSource(Source):
    """All images under a folder, named by their paths in it with forward slashes; links are followed.

    The index is stale when a file or folder was added, removed or renamed: that changes the modification time of the
    folder it lies in, and these times are all that is compared. A file written over in place is not seen and need not
    be, since names, labels and split stay; what cannot be seen is a change on a file system that keeps no such times,
    or by someone who sets them back.
    """

    @classmethod
    def matches(cls, path: str) -> bool:
        del path
        return True  # the last in the list: what no other kind takes is meant as a folder

    @classmethod
    def scan(cls, path: str) -> ImageIndex:
        root = Path(path)
        if not root.is_dir():
            what = "a file" if root.exists() else "missing"
            raise UserError(
                f"data.path: {path} is {what}; give a folder of images, a .zip or .tar of them, or `scenes`"
            )
        names: list[str] = []
        folders: dict[str, int] = {}
        started = time.time_ns()
        for where, _, found in os.walk(path, followlinks=True):
            relative = os.path.relpath(where, path).replace(os.sep, "/")
            changed = Path(where).stat().st_mtime_ns
            folders[relative] = changed if changed < started - _TICK else -1  # −1 equals no time: scan again
            prefix = "" if relative == "." else relative + "/"
            names += [prefix + name for name in found if is_image(name)]
        require(names, path)
        return ImageIndex.build(names, stamp={"root": str(root.resolve()), "folders": folders})

    @classmethod
    def unchanged(cls, path: str, stamp: dict[str, Any]) -> bool:
        if stamp.get("root") != str(Path(path).resolve()):
            return False
        try:
            return all(Path(path, name).stat().st_mtime_ns == at for name, at in stamp["folders"].items())
        except OSError:
            return False

    def open(self, number: int, size: tuple[int, int]) -> Path:
        del size
        return Path(self.path, self.index.names[number])

"""Sources of images. To add one, add a file with its class, and the class to `SOURCES`."""

from pathlib import Path

from vqvae2 import distributed
from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.base import Source
from vqvae2.data.sources.file_list import ListSource
from vqvae2.data.sources.folder import FolderSource
from vqvae2.data.sources.huggingface import HuggingFaceSource
from vqvae2.data.sources.mazes import MazeSource
from vqvae2.data.sources.prepared import PreparedSource
from vqvae2.data.sources.scenes import SceneSource
from vqvae2.data.sources.tar import TarSource
from vqvae2.data.sources.torchvision import TorchvisionSource
from vqvae2.data.sources.videos import VideoSource
from vqvae2.data.sources.zip import ZipSource

# The first source that matches a path opens it. FolderSource matches any path.
SOURCES: tuple[type[Source], ...] = (
    SceneSource,
    MazeSource,
    VideoSource,
    TorchvisionSource,
    HuggingFaceSource,
    PreparedSource,
    ZipSource,
    TarSource,
    ListSource,
    FolderSource,
)


def absolute_source(path: str) -> str:
    """Return a local path as an absolute path, with `~` expanded; return names and addresses unchanged."""
    if path == "scenes":
        return path
    return next(kind for kind in SOURCES if kind.matches(path)).absolute(path)


def open_source(path: str, cache: Path | None = None) -> Source:
    """Open the source at `path`. Its index is stored in the file `cache`, and reused until the source changes.

    Raises:
        UserError: If there is no source, or it cannot be read.
    """
    kind = next(kind for kind in SOURCES if kind.matches(path))
    cache = cache if kind.caches_index else None
    index = ImageIndex.load(cache) if cache else None
    if index is None or not kind.is_unchanged(path, index.stamp):
        index = kind.scan(path)
        if cache and distributed.get_rank() == 0:
            index.save(cache)
    return kind(path, index)

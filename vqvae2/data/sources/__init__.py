"""Where images come from. A new kind of source is one file here and its name in `SOURCES`."""

from pathlib import Path

from vqvae2 import distributed
from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.base import Source
from vqvae2.data.sources.folder import FolderSource
from vqvae2.data.sources.huggingface import HuggingFaceSource
from vqvae2.data.sources.prepared import PreparedSource
from vqvae2.data.sources.scenes import SceneSource
from vqvae2.data.sources.tar import TarSource
from vqvae2.data.sources.torchvision import TorchvisionSource
from vqvae2.data.sources.zip import ZipSource

# The first that takes a path opens it; a folder takes what is left.
SOURCES: tuple[type[Source], ...] = (
    SceneSource,
    TorchvisionSource,
    HuggingFaceSource,
    PreparedSource,
    ZipSource,
    TarSource,
    FolderSource,
)


def open_source(path: str, cache: Path | None = None) -> Source:
    """The source that `path` names; UserError where there is none.

    With a `cache`, a file, its index is kept there, and made anew only when the source has changed.
    """
    kind = next(kind for kind in SOURCES if kind.matches(path))
    keep = cache if kind.keeps_index else None
    index = ImageIndex.load(keep) if keep else None
    if index is None or not kind.unchanged(path, index.stamp):
        index = kind.scan(path)
        if keep and distributed.get_rank() == 0:
            index.save(keep)
    return kind(path, index)

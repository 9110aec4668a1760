"""Video files: `videos:FOLDER`. Each file is a clip, and its frames are images."""

from functools import lru_cache
from pathlib import Path

from PIL import Image

from vqvae2.data.image_io import UnreadableImageError
from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.base import Source, absolute_path, require_images
from vqvae2.data.sources.folder import walk_folders
from vqvae2.errors import UserError
from vqvae2.packages import import_package

_PREFIX = "videos:"
_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


class VideoSource(Source):
    """Frames of the video files in a folder and its subfolders, named FILE/FRAME, without labels.

    All frames of a file are decoded at once and kept until another file is read. `vqvae2 prepare` stores them for
    training, which reads them in random order. Requires the package `av`.
    """

    caches_index = False

    @classmethod
    def matches(cls, path: str) -> bool:
        return path.startswith(_PREFIX)

    @classmethod
    def absolute(cls, path: str) -> str:
        return _PREFIX + absolute_path(path.removeprefix(_PREFIX))

    @classmethod
    def scan(cls, path: str) -> ImageIndex:
        root = Path(path.removeprefix(_PREFIX))
        if not root.is_dir():
            raise UserError(f"data.path: no such folder: {root}. Give a folder of video files: videos:FOLDER.")
        found = [folder.path / name for folder in walk_folders(root) for name in folder.files]
        names = []
        for file in (each for each in found if each.suffix.lower() in _SUFFIXES):
            try:
                count = len(_decode(file))
            except UnreadableImageError as error:
                raise UserError(f"data.path: {file}: {error.reason}. Remove or replace it.") from None
            names += [f"{file.relative_to(root).as_posix()}/{frame:06d}" for frame in range(count)]
        require_images(names, path)
        return ImageIndex.build(names, [None] * len(names))

    def open(self, number: int, size: tuple[int, int]) -> Image.Image:
        del size
        file, _, frame = self.index.names[number].rpartition("/")
        return _decode(Path(self.path.removeprefix(_PREFIX), file))[int(frame)]


@lru_cache(maxsize=1)
def _decode(path: Path) -> list[Image.Image]:
    """Return all frames of a video file."""
    av = import_package("av", "video")
    try:
        with av.open(str(path)) as container:
            return [frame.to_image() for frame in container.decode(video=0)]
    except (av.error.FFmpegError, IndexError, ValueError) as error:  # IndexError: without a video stream
        raise UnreadableImageError(path, f"not a readable video ({error})") from None

"""The built-in data set of videos: `mazes:CLIPS`, or `mazes:CLIPS:FRAMES` with another number of frames than 24."""

import re

from PIL import Image

from vqvae2.data.index import ImageIndex
from vqvae2.data.mazes.walks import ACTIONS, make_walk, render_clip
from vqvae2.data.sources.base import Source
from vqvae2.errors import UserError

_PREFIX, _FRAMES = "mazes:", 24


class MazeSource(Source):
    """Frames of walks through mazes, named CLIP/FRAME. The label of a frame is the action that led to it."""

    caches_index = False

    @classmethod
    def matches(cls, path: str) -> bool:
        return path.startswith(_PREFIX)

    @classmethod
    def absolute(cls, path: str) -> str:
        return path

    @classmethod
    def scan(cls, path: str) -> ImageIndex:
        clips, frames = _parse(path)
        names = [f"{clip:06d}/{frame:04d}" for clip in range(clips) for frame in range(frames)]
        actions = [ACTIONS[action] for clip in range(clips) for action in make_walk(clip, frames).actions]
        return ImageIndex.build(names, actions, classes=ACTIONS)

    def open(self, number: int, size: tuple[int, int]) -> Image.Image:
        _, frames = _parse(self.path)
        clip, frame = divmod(number, frames)
        return Image.fromarray(render_clip(clip, frames, size)[frame])

    def location(self, number: int) -> str:
        return f"{_PREFIX}{self.index.names[number]}"  # whatever the number of clips


def _parse(path: str) -> tuple[int, int]:
    """Return the number of clips and of the frames of a clip."""
    match = re.fullmatch(r"(\d{1,6})(?::(\d{1,4}))?", path.removeprefix(_PREFIX))
    clips, frames = (int(match[1]), int(match[2] or _FRAMES)) if match else (0, 0)
    if not (clips and frames):
        raise UserError(f"data.path: {path}: expected mazes:CLIPS, such as mazes:2500, or mazes:CLIPS:FRAMES.")
    return clips, frames

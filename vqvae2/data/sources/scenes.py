"""The built-in data set of procedural scenes: `scenes:COUNT`, from `data.path: scenes` and `data.num_scenes`."""

import hashlib
from typing import ClassVar

import numpy as np
from PIL import Image

from vqvae2.data import scenes
from vqvae2.data.index import ImageIndex, StringTable
from vqvae2.data.sources.base import Source

_PREFIX = "scenes:"


class SceneSource(Source):
    """The first COUNT scenes. Rendered images are cached in memory, for all stages that run in one process."""

    caches_index = False
    _rendered: ClassVar[dict[tuple[int, tuple[int, int]], Image.Image]] = {}

    @classmethod
    def matches(cls, path: str) -> bool:
        return path.startswith(_PREFIX)

    @classmethod
    def absolute(cls, path: str) -> str:
        return path

    @classmethod
    def scan(cls, path: str) -> ImageIndex:
        count = int(path.removeprefix(_PREFIX))
        labels = np.array([scenes.label(number) for number in range(count)], np.int32)
        names = [f"{scenes.CLASSES[label]}/{number:06d}" for number, label in enumerate(labels)]
        hashed = (hashlib.sha256(f"scene {number}".encode()).digest()[:8] for number in range(count))
        hashes = np.fromiter(map(int.from_bytes, hashed), np.uint64, count)
        return ImageIndex(StringTable.from_strings(names), labels, hashes, scenes.CLASSES)

    def open(self, number: int, size: tuple[int, int]) -> Image.Image:
        key = number, size
        if key not in self._rendered:
            self._rendered[key] = Image.fromarray(scenes.render(number, *size))
        return self._rendered[key]

"""Images as tensors: folders of files or the built-in scenes, split by a stable hash, through one transform.

Workers hand out uint8 (C, H, W), a quarter of the memory of floats; `to_float` makes them float32 in [-1, 1] on the
device.
"""

import hashlib
import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from vqvae2.config import Config
from vqvae2.data import scenes
from vqvae2.errors import UserError

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class DataConfig(Config):
    """Where images come from and how they become tensors."""

    path: str = Field(default="scenes", description="a folder of images, or `scenes`, the built-in data set")
    size: int | tuple[int, int] = Field(default=256, description="side of a square, or height and width, in pixels")
    channels: Literal[1, 3, 4] = Field(default=3, description="1 grey, 3 RGB, 4 RGBA")
    labels: Literal["none", "folder"] = Field(
        default="none", description="`folder`: the first folder in a path is its class"
    )
    validation: float = Field(default=0.05, gt=0, lt=1, description="share of images that is held out")
    crop: Literal["center", "random"] = "center"
    flip: bool = Field(default=False, description="mirror half of the training images")
    count: int = Field(default=4096, ge=2, description="how many pictures `scenes` has")
    workers: int = Field(default=2, ge=0, description="processes that decode images; 0 decodes in the main one")

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class Item(NamedTuple):
    """One image as workers hand it out."""

    image: UInt8[Tensor, "c h w"]
    label: int  # −1 where there are no labels


class Images(Dataset[Item]):
    """One split of a data set, in a stable order; `images[i]` is untouched, `images[i, draw]` is augmented by `draw`.

    `classes` are the names of the labels (empty without labels), `names` what tells the images apart.
    """

    def __init__(self, config: DataConfig, names: list[str], classes: tuple[str, ...]) -> None:
        self.config, self.names, self.classes = config, names, classes
        self._label_of = {name: label for label, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        index, draw = key if isinstance(key, tuple) else (key, None)
        image = self._read(index, draw)
        if draw is not None and self.config.flip and draw & 1:
            image = image[:, ::-1]
        return Item(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), self.label(index))

    def label(self, index: int) -> int:
        """The label of an image, −1 where there are none."""
        return self._label_of[self.names[index].split("/", 1)[0]] if self.classes else -1

    def _read(self, index: int, draw: int | None) -> np.ndarray:
        where = (0.5, 0.5)
        if draw is not None and self.config.crop == "random":
            across, down = np.random.default_rng(draw).random(2)
            where = (float(across), float(down))
        return read_image(Path(self.config.path) / self.names[index], self.config.shape, self.config.channels, where)


class Scenes(Images):
    """The built-in pictures, each drawn once and kept."""

    def __init__(self, config: DataConfig, numbers: list[int]) -> None:
        classes = scenes.CLASSES if config.labels == "folder" else ()
        super().__init__(config, [f"{scenes.CLASSES[scenes.label(n)]}/{n:06d}" for n in numbers], classes)
        self.numbers = numbers
        self._drawn: dict[int, np.ndarray] = {}

    def _read(self, index: int, draw: int | None) -> np.ndarray:
        if index not in self._drawn:
            picture = scenes.render(self.numbers[index], *self.config.shape)
            if self.config.channels != 3:
                picture = np.array(Image.fromarray(picture).convert(_MODES[self.config.channels]))
            self._drawn[index] = picture.reshape(*self.config.shape, self.config.channels)
        return self._drawn[index]


def open_images(config: DataConfig) -> tuple[Images, Images]:
    """The training and the validation split; UserError where there are no images."""
    if config.path == "scenes":
        numbers = _split([f"scene {number}" for number in range(config.count)], config.validation)
        return Scenes(config, numbers[0]), Scenes(config, numbers[1])
    names = find_images(Path(config.path))
    if len(names) < 2:
        raise UserError(f"data.path: {config.path} holds one image; two are needed, one to train on, one held out")
    classes: tuple[str, ...] = ()
    if config.labels == "folder":
        loose = next((name for name in names if "/" not in name), None)
        if loose:
            raise UserError(f"data.labels: `folder`, but {config.path}/{loose} lies in no class folder; use `none`")
        classes = tuple(sorted({name.split("/", 1)[0] for name in names}))
    training, held_out = _split(names, config.validation)
    return (
        Images(config, [names[index] for index in training], classes),
        Images(config, [names[index] for index in held_out], classes),
    )


def find_images(folder: Path) -> list[str]:
    """Paths of all image files under `folder`, relative to it, with forward slashes, sorted; links are followed."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "missing"
        raise UserError(f"data.path: {folder} is {what}; give a folder of images, or `scenes`")
    names = [
        Path(root, file).relative_to(folder).as_posix()
        for root, _, files in os.walk(folder, followlinks=True)
        for file in files
        if Path(file).suffix.lower() in EXTENSIONS and not file.startswith(".")
    ]
    if not names:
        raise UserError(f"data.path: {folder} holds no images (looked for {', '.join(sorted(EXTENSIONS))})")
    return sorted(names)


def read_image(
    path: Path, size: tuple[int, int], channels: int = 3, where: tuple[float, float] = (0.5, 0.5)
) -> UInt8[np.ndarray, "h w c"]:
    """Decode an image, upright, and resize it with antialiasing so that it just covers `size`; crop what juts out.

    `where` places the crop from (0, 0), left and top, to (1, 1), right and bottom. JPEGs are decoded at a reduced scale
    where that is still at least twice the size. Raises UserError where the file is no image or is cut short.
    """
    height, width = size
    try:
        with Image.open(path) as image:
            image.draft(None, (2 * max(size), 2 * max(size)))  # before EXIF turns the picture
            upright = ImageOps.exif_transpose(image)
            picture = upright if upright.mode == _MODES[channels] else upright.convert(_MODES[channels])
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        reason = "no image format is recognised in it" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{path}: cannot be read as an image ({reason}); remove or replace it") from None
    if (picture.height, picture.width) != size:
        scale = max(height / picture.height, width / picture.width)
        spare = (picture.width - width / scale, picture.height - height / scale)
        left, upper = spare[0] * where[0], spare[1] * where[1]
        box = (left, upper, left + width / scale, upper + height / scale)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.array(picture, dtype=np.uint8).reshape(height, width, channels)


def to_float(images: UInt8[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
    """0 … 255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images: Float[Tensor, "*b c h w"]) -> UInt8[Tensor, "*b c h w"]:
    """[-1, 1] to 0 … 255, rounded, clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _split(names: list[str], share: float) -> tuple[list[int], list[int]]:
    """Indices of training and held-out names; each name's side depends on it alone, so more files move none.

    At least one name is on each side, for folders so small that chance would leave one empty.
    """
    hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names]
    order = sorted(range(len(names)), key=hashes.__getitem__)
    bound = max(share, hashes[order[0]])
    held_out = [index for index in order[:-1] if hashes[index] <= bound]
    chosen = set(held_out)
    return [index for index in range(len(names)) if index not in chosen], sorted(held_out)

"""Resized images in LMDB, written by `vqvae2 prepare`: the source and the writer."""

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from vqvae2 import files
from vqvae2.code_maps import PositiveInt
from vqvae2.config import Config
from vqvae2.data import lmdb_environment
from vqvae2.data.image_io import MAX_PIXELS, MODES, UnreadableImageError, decode_image
from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.base import Source
from vqvae2.errors import UserError, printable

Encoding = Literal["jpeg", "webp", "png", "raw"]
_RAW = b"RAW\0"  # prefix of raw records; width, height, channels and pixels follow
_HEADER = b"header"
_MAX_SIDE = {"jpeg": 65_500, "webp": 16_383}  # pixels that the format can store
_FIX = "Delete the folder and run `vqvae2 prepare` again."


class PreparedHeader(Config):
    """Contents and provenance of prepared images."""

    kind: Literal["images"] = "images"
    format: int = 1
    source: str  # `data.path` of the original images
    data: str  # digest of their names and labels
    size: tuple[PositiveInt, PositiveInt]  # (height, width) that every image covers
    channels: Literal[1, 3, 4] = 3
    encoding: Encoding = "jpeg"
    quality: int | None = Field(default=95, ge=1, le=100)  # for jpeg and webp
    count: int = Field(ge=0, le=2**40)  # number of images in the source, including unreadable ones
    classes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()  # names of unreadable images; set by `finish`
    complete: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """Fields that must be equal to resume. The location of the source is not one of them."""
        return self.model_dump(exclude={"source", "unreadable", "complete"})

    def fits(self, index: ImageIndex) -> bool:
        """Return whether an index lists the readable images of this header with their positions."""
        positions = index.columns.get("position", np.empty(0))
        return (
            len(positions) == len(index) == self.count - len(self.unreadable)
            and bool(((positions >= 0) & (positions < self.count)).all())
            and index.classes == self.classes
        )


class PreparedSource(Source):
    """A folder written by `vqvae2 prepare`. Names and labels are those of the original images."""

    caches_index = False

    @classmethod
    def matches(cls, path: str) -> bool:
        return Path(path, "data.mdb").is_file()

    @classmethod
    def scan(cls, path: str) -> ImageIndex:
        header = read_header(Path(path))
        if not (header.complete and lmdb_environment.is_sealed(Path(path))):
            raise UserError(f"data.path: {path} is unfinished. Run the same `vqvae2 prepare` again to complete it.")
        index = ImageIndex.load(_index_file(Path(path)))
        if index is None or not header.fits(index):
            raise UserError(f"data.path: {path}: missing or corrupted {_index_file(Path(path)).name}. {_FIX}")
        return index

    def open(self, number: int, size: tuple[int, int]) -> bytes | Image.Image:
        del size
        position = int(self.index.columns["position"][number])
        value = lmdb_environment.get(_open_reader(Path(self.path)), lmdb_environment.encode_key(position))
        if not value:
            raise UnreadableImageError(self.describe(number), "missing record")
        return _unpack(value) if value[:4] == _RAW else value


def read_header(path: Path) -> PreparedHeader:
    """Return the header of the prepared images at `path`, finished or not.

    Raises:
        UserError: If there are no prepared images or they are corrupted.
    """
    found = lmdb_environment.get(_open_reader(path), _HEADER)
    data = files.parse_json(found, path, _FIX) if found else {}
    if not isinstance(data, dict) or data.get("kind") != "images":
        kind = "a code store" if isinstance(data, dict) and "autoencoder" in data else "another LMDB database"
        raise UserError(f"data.path: {path} is {kind}. Give images, or a folder written by `vqvae2 prepare`.")
    return PreparedHeader.from_dict(data, str(path), fix=_FIX)


class PreparedWriter:
    """Writer of prepared images, in order. It resumes the work of an interrupted writer.

    `header` is the header in the folder. `finished` is whether the folder is already complete.

    Raises:
        UserError: If the folder has other contents.
    """

    def __init__(self, path: Path, header: PreparedHeader) -> None:
        names = [child.name for child in path.iterdir()] if path.is_dir() else []
        new = all(name == lmdb_environment.LOCK_FILE or files.is_leftover(name) for name in names)
        if not new and not (path / "data.mdb").is_file():
            raise UserError(f"{path}: not empty and not prepared images. Choose another folder.")
        self.path, self.header, self.finished = path, header, False
        if lmdb_environment.exists(path):
            self.header = read_header(path)
            self.finished = self.header.complete and lmdb_environment.is_sealed(path)
            if self.header.identity != header.identity:
                raise UserError(
                    f"{path}: prepared images of another source, size or format. Delete or choose another folder."
                )
        self.environment = lmdb_environment.open_writer(path)
        if lmdb_environment.get(self.environment, _HEADER) is None:
            lmdb_environment.put(self.environment, [(_HEADER, header.to_json())])

    def num_written(self) -> int:
        """Return the number of images written so far."""
        with self.environment.begin() as transaction:
            return transaction.stat()["entries"] - 1

    def write(self, first: int, images: Sequence[bytes]) -> None:
        """Write encoded images from position `first`. Empty bytes mark an unreadable image."""
        lmdb_environment.put(
            self.environment,
            ((lmdb_environment.encode_key(first + offset), image) for offset, image in enumerate(images)),
        )

    def unreadable_records(self) -> list[int]:
        """Return the positions of unreadable images among those written."""
        with self.environment.begin(buffers=True) as transaction:
            return [
                int.from_bytes(bytes(key), "big")
                for key, value in transaction.cursor()
                if len(key) == lmdb_environment.KEY_BYTES and not len(value)
            ]

    def finish(self, index: ImageIndex) -> PreparedHeader:
        """Write the index of the readable images, mark the folder as complete, close and seal it."""
        unreadable = self.unreadable_records()
        readable = np.setdiff1d(np.arange(self.header.count), unreadable)
        index.take(readable, {"position": readable}).save(_index_file(self.path))
        names = tuple(printable(index.names[position]) for position in unreadable)
        header = self.header.model_copy(update={"unreadable": names, "complete": True})
        lmdb_environment.put(self.environment, [(_HEADER, header.to_json())])
        self.close()
        lmdb_environment.seal(self.path)
        return header

    def close(self) -> None:
        """Close the file. A new writer can resume."""
        self.environment.close()


def encode_image(
    file: Path | bytes | Image.Image, header: PreparedHeader, name: str, max_pixels: int = MAX_PIXELS
) -> bytes:
    """Resize an image to the smallest size that covers `header.size`, and encode it as a record. Nothing is cropped.

    Raises:
        UnreadableImageError: If the image is unreadable, or so elongated that the result is too large.
    """
    image = decode_image(file, header.size, header.channels, name, max_pixels)
    scale = max(header.size[0] / image.height, header.size[1] / image.width)
    size = round(image.width * scale), round(image.height * scale)
    if size[0] * size[1] > max_pixels or max(size) > _MAX_SIDE.get(header.encoding, max_pixels):
        reason = f"too elongated: {image.width}×{image.height} pixels would be resized to {size[0]}×{size[1]}"
        raise UnreadableImageError(name, reason)
    if scale != 1.0:
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if header.encoding == "raw":
        return _RAW + struct.pack("<3I", *image.size, len(image.getbands())) + image.tobytes()
    stream = io.BytesIO()
    quality = {} if header.quality is None else {"quality": header.quality}
    image.save(stream, header.encoding, **quality)
    return stream.getvalue()


def _unpack(value: bytes) -> Image.Image:
    width, height, channels = struct.unpack_from("<3I", value, len(_RAW))
    return Image.frombytes(MODES[channels], (width, height), value[len(_RAW) + 12 :])


def _open_reader(path: Path) -> Any:
    return lmdb_environment.open_reader(path, "prepared images", _FIX)


def _index_file(path: Path) -> Path:
    return path / "index.safetensors"

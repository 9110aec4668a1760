"""Images resized and stored in LMDB by `vqvae2 prepare`: what reads them, what writes them."""

import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from vqvae2.code_maps import PositiveInt
from vqvae2.config import Config
from vqvae2.data import lmdb_store
from vqvae2.data.image_io import MODES, UnreadableImageError, decode
from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.base import Source
from vqvae2.errors import UserError

Encoding = Literal["jpeg", "webp", "png", "raw"]
_RAW = b"RAW\0"  # before width, height, channels and the pixels
_HEADER, _KIND = b"header", "prepared images; delete the folder and prepare them again"


class PreparedHeader(Config):
    """What a prepared data set holds and what it was made from."""

    kind: Literal["images"] = "images"
    format: int = 1
    source: str  # `data.path` it was made from
    data: str  # digest of its names and labels
    size: tuple[PositiveInt, PositiveInt]  # height and width that every image just covers
    channels: Literal[1, 3, 4] = 3
    encoding: Encoding = "jpeg"
    quality: int | None = Field(default=95, ge=1, le=100)  # of jpeg and webp
    count: int  # images of the source, those left out included
    classes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()  # names of those left out; known in the end
    complete: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree for one command to go on with another's work: not where the source lies."""
        return self.model_dump(exclude={"source", "unreadable", "complete"})


class PreparedSource(Source):
    """The folder that `vqvae2 prepare` wrote; its images have the names and labels of their source."""

    keeps_index = False

    @classmethod
    def matches(cls, path: str) -> bool:
        return Path(path, "data.mdb").is_file()

    @classmethod
    def scan(cls, path: str) -> ImageIndex:
        if not (read_header(Path(path)).complete and lmdb_store.is_sealed(Path(path))):
            raise UserError(f"data.path: {path} is unfinished; run the same `vqvae2 prepare` again to complete it")
        index = ImageIndex.load(_index(Path(path)))
        if index is None:
            raise UserError(f"data.path: {path} has no readable {_index(Path(path)).name}; prepare the images again")
        return index

    def open(self, number: int, size: tuple[int, int]) -> bytes | Image.Image:
        del size
        position = int(self.index.columns["position"][number])
        value = lmdb_store.get(lmdb_store.open_reader(Path(self.path), _KIND), lmdb_store.encode_key(position))
        if not value:
            raise UnreadableImageError(self.describe(number), "its record is missing")
        return _unpack(value) if value[:4] == _RAW else value


def read_header(path: Path) -> PreparedHeader:
    """What the prepared images at `path` say of themselves; UserError where they are something else."""
    found = lmdb_store.get(lmdb_store.open_reader(path, _KIND), _HEADER)
    data = json.loads(found) if found else {}
    if data.get("kind") != "images":
        what = "a code store" if "autoencoder" in data else "an LMDB of something else"
        raise UserError(f"data.path: {path} is {what}; give images, or what `vqvae2 prepare` made of them")
    return PreparedHeader.parse(data, str(path))


class PreparedWriter:
    """Writes images in order; what a killed writer left is gone on with, to the same records.

    `header` is what stands in the folder, `finished` whether nothing is left to do.
    """

    def __init__(self, path: Path, header: PreparedHeader) -> None:
        if path.is_dir() and any(path.iterdir()) and not (path / "data.mdb").is_file():
            raise UserError(f"{path}: not empty and not prepared images; choose another folder")
        self.path, self.header, self.finished = path, header, False
        if lmdb_store.exists(path):
            self.header = read_header(path)
            self.finished = self.header.complete and lmdb_store.is_sealed(path)
            if self.header.identity != header.identity:
                raise UserError(
                    f"{path}: holds images of another source, size or format; delete the folder or name another"
                )
        self.environment = lmdb_store.open_writer(path)
        if lmdb_store.get(self.environment, _HEADER) is None:
            lmdb_store.put(self.environment, [(_HEADER, header.model_dump_json().encode())])

    def num_written(self) -> int:
        """How many images are written: the first so many, since they are written in order."""
        with self.environment.begin() as transaction:
            return transaction.stat()["entries"] - 1

    def write(self, first: int, images: Sequence[bytes]) -> None:
        """Write images from position `first`; an empty one is unreadable."""
        lmdb_store.put(
            self.environment, ((lmdb_store.encode_key(first + at), image) for at, image in enumerate(images))
        )

    def unreadable_records(self) -> list[int]:
        """Positions of the unreadable among what is written."""
        with self.environment.begin(buffers=True) as transaction:
            return [
                int.from_bytes(bytes(key), "big")
                for key, value in transaction.cursor()
                if len(key) == lmdb_store.KEY_BYTES and not len(value)
            ]

    def finish(self, index: ImageIndex) -> PreparedHeader:
        """Write the index of the readable ones, mark the folder complete, close and seal it."""
        left_out = self.unreadable_records()
        kept = np.setdiff1d(np.arange(self.header.count), left_out)
        index.take(kept, {"position": kept}).save(_index(self.path))
        names = tuple(index.names[position] for position in left_out)
        header = self.header.model_copy(update={"unreadable": names, "complete": True})
        lmdb_store.put(self.environment, [(_HEADER, header.model_dump_json().encode())])
        self.close()
        lmdb_store.seal(self.path)
        return header

    def close(self) -> None:
        """Close the file; the same command goes on with it."""
        self.environment.close()


def encode(file: Path | bytes | Image.Image, header: PreparedHeader, name: str) -> bytes:
    """An image resized so that it just covers the size, nothing cropped, as the bytes of a record."""
    picture = decode(file, header.size, header.channels, name)
    scale = max(header.size[0] / picture.height, header.size[1] / picture.width)
    if scale != 1.0:
        size = round(picture.width * scale), round(picture.height * scale)
        picture = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if header.encoding == "raw":
        return _RAW + struct.pack("<3I", *picture.size, len(picture.getbands())) + picture.tobytes()
    stream = io.BytesIO()
    quality = {} if header.quality is None else {"quality": header.quality}
    picture.save(stream, header.encoding, **quality)
    return stream.getvalue()


def _unpack(value: bytes) -> Image.Image:
    width, height, channels = struct.unpack_from("<3I", value, len(_RAW))
    return Image.frombytes(MODES[channels], (width, height), value[len(_RAW) + 12 :])


def _index(path: Path) -> Path:
    return path / "index.safetensors"

"""Sets of images as streams of uint8 batches: a folder, or an .npz with `arr_0`; each process gets its share."""

import hashlib
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vqvae2 import distributed
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.errors import UserError
from vqvae2.pictures import hwc_to_chw

# Those that pytorch-fid's command takes, from the folder itself and in lower case, so that numbers agree.
EXTENSIONS = ("bmp", "jpg", "jpeg", "pgm", "png", "ppm", "tif", "tiff", "webp")


class Batch(NamedTuple):
    """Images with their numbers, 0 … count − 1, in the whole set."""

    indices: Int64[Tensor, "n"]
    images: UInt8[Tensor, "n 3 h w"]


Shape = tuple[int, int, int, int]
Item = tuple[int, Tensor]  # (number in the set, uint8 (3, H, W))


class ImageFolder(Dataset[Item]):
    """The images that lie directly in a folder, sorted by name, converted to RGB as pytorch-fid does.

    Raises UserError where there are none, or one; reading raises it for an unreadable or 16-bit image.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: {'not a folder or .npz' if folder.exists() else 'no such folder or .npz file'}")
        self.folder = folder
        self.files = sorted(file for file in folder.iterdir() if _is_image(file))
        if len(self.files) < 2:
            few = "holds one image; a distance needs at least two" if self.files else "holds no images"
            raise UserError(f"{folder}: {few} ({', '.join(EXTENSIONS)}){_hint(folder)}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        return index, _read(self.files[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """A batch, refused where its images are not of one size: the first two that differ are named."""
        items = [self[index] for index in indices]
        for item in items:
            self._check_size(items[0], item)
        return items

    def batches(self, batch_size: int = 50, num_workers: int = 0) -> Iterator[Batch]:
        """This process's share, decoded by `num_workers` processes; UserError where two images differ in size."""
        order = SequentialBatchSampler(len(self), batch_size, distributed.get_rank(), distributed.get_world_size())
        first: Batch | None = None
        for indices, images in load_batches(self, order, num_workers):
            first = first or Batch(indices, images)
            self._check_size((int(first.indices[0]), first.images[0]), (int(indices[0]), images[0]))
            yield Batch(indices, images)

    @property
    def formats(self) -> dict[str, int]:
        """How many files have which extension."""
        return dict(sorted(Counter(file.suffix[1:] for file in self.files).items()))

    def digest(self) -> str:
        """SHA-256 of the names, sizes and times of modification of the files, in hexadecimal.

        StringTable what a cache holds. Reading a million images to hash their bytes would cost as much as decoding them, so
        this trusts what make and rsync trust; a file that is touched is measured anew, and one replaced by another of
        equal size keeps its time only where someone sets it on purpose.
        """
        sha = hashlib.sha256()
        for file in self.files:
            status = file.stat()
            sha.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return sha.hexdigest()

    def _check_size(self, a: Item, b: Item) -> None:
        if a[1].shape != b[1].shape:
            sizes = [
                f"{self.files[index].name} has {image.shape[2]}×{image.shape[1]} pixels" for index, image in (a, b)
            ]
            raise UserError(f"{self.folder}: {sizes[0]}, {sizes[1]}; all must be of one size")


class ImageArray:
    """The uint8 images (N, H, W, 3) stored as `arr_0` in an .npz, as samples are often exchanged; read as a stream."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _open_array(path) as (_, shape):
            self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int = 50, num_workers: int = 0) -> Iterator[Batch]:
        """This process's share; there is nothing for `num_workers` to decode."""
        del num_workers
        count, height, width, channels = self.shape
        size = height * width * channels
        with _open_array(self.path) as (file, _):
            for number, start in enumerate(range(0, count, batch_size)):
                stop = min(start + batch_size, count)
                pixels = bytearray(file.read((stop - start) * size))
                if len(pixels) < (stop - start) * size:
                    raise UserError(f"{self.path}: `arr_0` ends early; make it again")
                if number % distributed.get_world_size() == distributed.get_rank():
                    images = np.frombuffer(pixels, np.uint8).reshape(stop - start, height, width, channels)
                    yield Batch(torch.arange(start, stop), hwc_to_chw(images))

    @property
    def formats(self) -> dict[str, int]:
        """How many images have which format."""
        return {"npz": len(self)}

    def digest(self) -> str:
        """SHA-256 of the file's name, size and time of modification; see `ImageFolder.digest`."""
        status = self.path.stat()
        return hashlib.sha256(f"{self.path.name}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()


@contextmanager
def _open_array(path: Path) -> Iterator[tuple[IO[bytes], Shape]]:
    """`arr_0` of an .npz, open for reading behind its header, and its shape."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            if len(shape) != 4 or shape[3] != 3 or min(shape[1:]) < 1 or dtype != np.uint8 or fortran:
                raise UserError(f"{path}: `arr_0` is {dtype} {shape}; expected uint8 images (N, H, W, 3)")
            if shape[0] < 2:
                raise UserError(f"{path}: holds {shape[0]} images; a distance needs at least two")
            yield file, shape
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except KeyError:
        raise UserError(f"{path}: no `mu` and `sigma`, and no images `arr_0`; expected one or the other") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a readable .npz ({error}); make it again") from None


Images = ImageFolder | ImageArray


def open_images(path: Path) -> Images:
    """Images of a folder, or of an .npz that stores them as `arr_0`."""
    return ImageArray(path) if path.suffix == ".npz" else ImageFolder(path)


def _read(path: Path) -> UInt8[Tensor, "3 h w"]:
    try:
        with Image.open(path) as image:
            # Pillow clips 16-bit grey to 255 on its way to RGB: a white picture, and a wrong number.
            if image.mode.startswith("I") or image.mode == "F":
                raise UserError(
                    f"{path}: pixels of more than 8 bits (mode {image.mode}); convert it to 8 bits a channel"
                )
            pixels = np.array(image.convert("RGB"))
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({error}); repair or remove it") from None
    return hwc_to_chw(pixels)


def _is_image(file: Path) -> bool:
    return file.suffix[1:] in EXTENSIONS and file.is_file()


def _hint(folder: Path) -> str:
    """Where images are that were not taken, for the error message."""
    for inner in sorted(child for child in folder.iterdir() if child.is_dir()):
        if any(_is_image(file) for file in inner.rglob("*")):
            return f"; there are some in sub-folders, as {inner.name}/, which are not searched: name one of them"
    if any(file.suffix[1:].lower() in EXTENSIONS for file in folder.iterdir() if not _is_image(file)):
        return "; extensions in capitals are not taken, as pytorch-fid does not: rename the files"
    return ""

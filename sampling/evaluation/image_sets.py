"""Image sets for evaluation: folders, archives and .npz files, read as uint8 batches and sharded over processes."""

import hashlib
import io
import math
import struct
import zipfile
from abc import ABC, abstractmethod
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

from vqvae2 import distributed, files
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.data.sources import open_source
from vqvae2.data.sources.base import warn_skipped
from vqvae2.data.sources.folder import walk_folders
from vqvae2.data.sources.tar import expand
from vqvae2.errors import UserError
from vqvae2.metrics.frechet import NPZ_ERRORS, read_array_header
from vqvae2.pictures import hwc_to_chw

ARCHIVES = (".zip", ".tar")
# Like pytorch-fid, match lower-case extensions, and search only the folder itself if it has images, so that the results
# agree.
EXTENSIONS = ("bmp", "jpg", "jpeg", "pgm", "png", "ppm", "tif", "tiff", "webp")


class ImageBatch(NamedTuple):
    """Images and their indices in the whole set, from 0 to count − 1."""

    indices: Int64[Tensor, "n"]
    images: UInt8[Tensor, "n 3 h w"]


Shape = tuple[int, int, int, int]
IndexedImage = tuple[int, Tensor]  # (index in the set, uint8 (3, H, W))


class ImageFiles(Dataset[IndexedImage], ABC):
    """Base class of sets of image files, converted to RGB as in pytorch-fid.

    Raises:
        UserError: On reading, if an image is unreadable or has more than 8 bits per channel.
    """

    path: Path
    names: Sequence[str]  # of the images, in order, relative to `path`

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> IndexedImage:
        return index, _read(self._open(index), f"{self.path / self.names[index]}")

    @abstractmethod
    def _open(self, index: int) -> Path | bytes:
        """Return the path or the contents of an image file."""

    @abstractmethod
    def digest(self) -> str:
        """Return a cache key, in hexadecimal: the SHA-256 of the names, sizes and modification times of the files.

        Hashing the contents would cost as much as decoding the images, so the key relies on modification times, like
        make and rsync.
        """

    def __getitems__(self, indices: Sequence[int]) -> list[IndexedImage]:
        """Return several images.

        Raises:
            UserError: If their sizes differ. The message names the first two files that differ.
        """
        items = [self[index] for index in indices]
        for item in items:
            self._check_size(items[0], item)
        return items

    def batches(self, batch_size: int = 50, num_workers: int = 0) -> Iterator[ImageBatch]:
        """Yield this process's share of the images, decoded by `num_workers` worker processes.

        Raises:
            UserError: If two images differ in size, or an image is unreadable.
        """
        order = SequentialBatchSampler(len(self), batch_size, distributed.get_rank(), distributed.get_world_size())
        first: ImageBatch | None = None
        for indices, images in load_batches(self, order, num_workers):
            first = first or ImageBatch(indices, images)
            self._check_size((int(first.indices[0]), first.images[0]), (int(indices[0]), images[0]))
            yield ImageBatch(indices, images)

    @property
    def formats(self) -> dict[str, int]:
        """Number of files by extension."""
        return dict(sorted(Counter(name.rpartition(".")[2] for name in self.names).items()))

    def _check_size(self, a: IndexedImage, b: IndexedImage) -> None:
        if a[1].shape != b[1].shape:
            sizes = [f"{self.names[index]} has {image.shape[2]}×{image.shape[1]} pixels" for index, image in (a, b)]
            raise UserError(f"{self.path}: image sizes differ: {', '.join(sizes)}. Resize all images to one size.")


class ImageFolder(ImageFiles):
    """The images directly in a folder or, if there are none, in its subfolders, sorted by path.

    Raises:
        UserError: If the folder is missing or holds no images.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            problem = (
                "not a folder, archive or .npz file" if folder.exists() else "no such folder, archive or .npz file"
            )
            raise UserError(f"{folder}: {problem}. Check the path.")
        self.path = folder
        found = [file for file in folder.iterdir() if file.is_file()]
        self.names = sorted(file.name for file in found if _is_image(file.name))
        self._skipped = [file.name for file in found if not _is_image(file.name)]
        if (folder / "manifest.json").is_file() and (folder / "images").is_dir():
            raise UserError(f"{folder}: a folder of `vqvae2 sample`. Give its images: {folder / 'images'}")
        if not self.names:
            self.names = _nested_images(folder)
        if not self.names:
            raise UserError(f"{folder}: no images found ({', '.join(EXTENSIONS)}){self._case_hint() or '.'}")

    def _open(self, index: int) -> Path:
        return self.path / self.names[index]

    def batches(self, batch_size: int = 50, num_workers: int = 0) -> Iterator[ImageBatch]:
        warn_skipped(self._skipped, self.path, self._case_hint())
        return super().batches(batch_size, num_workers)

    def digest(self) -> str:
        sha = hashlib.sha256()
        for name in self.names:
            status = (self.path / name).stat()
            sha.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return sha.hexdigest()

    def _case_hint(self) -> str:
        """Return a hint if images have upper-case extensions."""
        if any(Path(name).suffix[1:].lower() in EXTENSIONS and not name.startswith(".") for name in self._skipped):
            return ". Upper-case extensions are ignored, as in pytorch-fid: rename the files."
        return ""


class ImageArchive(ImageFiles):
    """The images in a .zip or .tar archive, sorted by path.

    Raises:
        UserError: If the archive is missing or unreadable, or holds no images.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._source = open_source(str(path))
        except UserError as error:
            raise UserError(str(error).removeprefix("data.path: ")) from None
        self.names = self._source.index.names

    def _open(self, index: int) -> Path | bytes:
        file = self._source.open(index, (0, 0))
        assert isinstance(file, Path | bytes)
        return file

    def digest(self) -> str:
        paths = [self.path] if self.path.is_file() else map(Path, expand(str(self.path)))  # one archive, or shards
        stamps = [(path.name, path.stat()) for path in paths]
        text = "\n".join(f"{name}\0{status.st_size}\0{status.st_mtime_ns}" for name, status in stamps)
        return hashlib.sha256(text.encode()).hexdigest()


class ImageArray:
    """The uint8 images (N, H, W, 3) stored as `arr_0` in an .npz, a common exchange format; read as a stream.

    Raises:
        UserError: If the file is missing or damaged, or does not hold such an array of at least two images.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _open_array(path) as (_, shape):
            self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int = 50, num_workers: int = 0) -> Iterator[ImageBatch]:
        """Yield this process's share of the images. `num_workers` is ignored, since no image has to be decoded.

        Raises:
            UserError: If the array is truncated.
        """
        del num_workers
        count, height, width, channels = self.shape
        size = height * width * channels
        with _open_array(self.path) as (file, _):
            for number, start in enumerate(range(0, count, batch_size)):
                stop = min(start + batch_size, count)
                pixels = bytearray(file.read((stop - start) * size))
                if len(pixels) < (stop - start) * size:
                    raise UserError(f"{self.path}: `arr_0` is truncated. Create the file again.")
                if number % distributed.get_world_size() == distributed.get_rank():
                    images = np.frombuffer(pixels, np.uint8).reshape(stop - start, height, width, channels)
                    yield ImageBatch(torch.arange(start, stop), hwc_to_chw(images))

    @property
    def formats(self) -> dict[str, int]:
        """Number of images by format."""
        return {"npz": len(self)}

    def digest(self) -> str:
        """Return the SHA-256 of the file's name, size and modification time; see `ImageFolder.digest`."""
        status = self.path.stat()
        return hashlib.sha256(f"{self.path.name}\0{status.st_size}\0{status.st_mtime_ns}".encode()).hexdigest()


@contextmanager
def _open_array(path: Path) -> Iterator[tuple[IO[bytes], Shape]]:
    """Open `arr_0` of an .npz, and yield the file, positioned behind the array's header, and the array's shape."""
    files.require_file(path)
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, fortran, dtype = read_array_header(file)
            if len(shape) != 4 or shape[3] != 3 or min(shape[1:]) < 1 or dtype != np.uint8 or fortran:
                raise UserError(f"{path}: `arr_0` is {dtype} {shape}; expected uint8 images (N, H, W, 3)")
            declared, stored = math.prod(shape), archive.getinfo("arr_0.npy").file_size - file.tell()
            if declared != stored:
                raise UserError(f"{path}: `arr_0` {shape} needs {declared:,} bytes, but the file has {stored:,}")
            if shape[0] < 2:
                raise UserError(f"{path}: found {shape[0]} images, but FID needs at least two")
            yield file, shape
    except UserError:
        raise
    except KeyError:
        raise UserError(f"{path}: expected arrays `mu` and `sigma` (statistics), or `arr_0` (images)") from None
    except NPZ_ERRORS as error:
        raise UserError(f"{path}: not a readable .npz ({error}). Create the file again.") from None


ImageSet = ImageFolder | ImageArchive | ImageArray


def open_image_set(path: Path) -> ImageSet:
    """Return the images of a folder, of a .zip or .tar archive, or of an .npz with `arr_0`.

    Raises:
        UserError: If `path` is neither, or holds no images.
    """
    if path.suffix == ".npz":
        return ImageArray(path)
    return ImageArchive(path) if path.suffix.lower() in ARCHIVES else ImageFolder(path)


def _read(file: Path | bytes, name: str) -> UInt8[Tensor, "3 h w"]:
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            # Pillow clips 16-bit gray to 255 when it converts to RGB, which would silently falsify the metric.
            if image.mode.startswith("I") or image.mode == "F":
                raise UserError(
                    f"{name}: more than 8 bits per channel (mode {image.mode}). Convert the image to 8 bits."
                )
            pixels = np.array(image.convert("RGB"))
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable image ({error}). Replace or remove it.") from None
    return hwc_to_chw(pixels)


def _is_image(name: str) -> bool:
    # Hidden files, such as the `._1.png` that macOS writes, are not images.
    return name.rpartition(".")[2] in EXTENSIONS and not name.startswith(".")


def _nested_images(folder: Path) -> list[str]:
    """Return the paths of the images in all subfolders that are not hidden, sorted."""
    names = [
        (found.path / name).relative_to(folder).as_posix()
        for found in walk_folders(folder)
        for name in found.files
        if _is_image(name)
    ]
    return sorted(names)

"""Output folders of sampled images. A manifest records how the images were made, and protects them from overwriting."""

import io
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator

from sampling.params import SamplingParams
from vqvae2 import files
from vqvae2.code_maps import PositiveInt
from vqvae2.config import Config
from vqvae2.errors import UserError
from vqvae2.pictures import IMAGE_ERRORS, load_image, save_grid, save_rows
from vqvae2.run_folder import RunFolder, level_names

ImageFormat = Literal["png", "webp"]  # both lossless
_GRID_IMAGES = 64
_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_PNG_MODES = {1: b"\x08\x00", 3: b"\x08\x02", 4: b"\x08\x06"}  # bit depth and color type, by number of channels
_PNG_END = b"IEND\xaeB`\x82"
_MAX_CLASS_ROWS, _CLASS_ROW_IMAGES = 64, 8
_FIX = "Restore it, or delete or choose another folder and sample again."


class Manifest(Config):
    """What the manifests of all commands record."""

    seed: int = Field(ge=0, le=2**63 - 1)
    sampling_params: SamplingParams
    autoencoder: str  # digest
    priors: tuple[str, ...]  # digests, finest level first
    torch: str  # version

    def matches(self, other: "Manifest") -> bool:
        """Return whether another manifest describes the same images. The batch size changes them only by rounding."""
        return self.model_dump(exclude={"batch_size"}) == other.model_dump(exclude={"batch_size"})

    def write(self, folder: Path) -> None:
        """Write manifest.json to a folder."""
        files.write_json(manifest_path(folder), self.model_dump(mode="json", exclude_unset=True))


class SampleManifest(Manifest):
    """How the images in a folder of `vqvae2 sample` were made."""

    count: int = Field(ge=1, le=2**40)
    labels: tuple[Annotated[int, Field(ge=0)], ...] | None  # of each image; None without classes
    class_names: tuple[str, ...]
    image_size: tuple[PositiveInt, PositiveInt]  # (height, width)
    format: ImageFormat = "png"
    batch_size: int | None = Field(default=None, ge=1, le=2**16)  # of all batches, also after an interruption
    rejection: dict[str, str | float] | None = None  # settings of the classifier-based rejection

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.labels is not None and len(self.labels) != self.count:
            raise ValueError(f"labels: {len(self.labels)} labels for {self.count} images")
        if self.labels and max(self.labels) >= len(self.class_names):
            raise ValueError(f"labels: the label {max(self.labels)} is not one of {len(self.class_names)} classes")
        return self


_Manifest = TypeVar("_Manifest", bound=Manifest)


def manifest_path(folder: Path) -> Path:
    """Return the path of a folder's manifest."""
    return folder / "manifest.json"


def read_manifest(folder: Path, cls: type[_Manifest]) -> _Manifest | None:
    """Return the manifest of a folder, or None if it has none.

    Raises:
        UserError: If the manifest is not a valid `cls`.
    """
    path = manifest_path(folder)
    return cls.from_json(path, _FIX) if path.is_file() else None


def find_other_network(manifest: Manifest, run: RunFolder) -> str | None:
    """Return the name of a network of a run with other weights than those the images were made with, if there is one.

    A network without weights in the run, because they were deleted, is not compared.
    """
    levels = level_names(len(manifest.priors))
    made_with = {run.autoencoder.path.name: (run.autoencoder_weights, manifest.autoencoder)}
    made_with |= {
        run.prior(level).path.name: (run.prior_weights(level), digest)
        for level, digest in zip(levels, manifest.priors, strict=True)
    }
    for name, (weights, digest) in made_with.items():
        if weights.is_file() and files.digest(weights) != digest:
            return name
    return None


def current_samples(run: RunFolder) -> Path:
    """Return the samples of a run that its present networks made: `samples`, or the newest of samples-2, …

    Returns `samples` if there are none.
    """
    numbered = [path for path in run.path.glob("samples-*") if re.fullmatch("samples-[0-9]+", path.name)]
    numbered.sort(key=lambda path: int(path.name.removeprefix("samples-")), reverse=True)
    for folder in (run.samples, *numbered):
        manifest = read_manifest(folder, SampleManifest)
        if manifest and find_other_network(manifest, run) is None:
            return folder
    return run.samples


def next_free(first: Path, is_free: Callable[[Path], bool], suffix: str = "") -> Path:
    """Return the first of NAME, NAME-2, NAME-3, … that `is_free`. The number comes before the `suffix` of NAME."""
    name, path, number = first.name.removesuffix(suffix), first, 1
    while not is_free(path):
        number += 1
        path = first.with_name(f"{name}-{number}{suffix}")
    return path


def next_new(first: Path, suffix: str = "") -> Path:
    """Return the first of NAME, NAME-2, NAME-3, … that does not exist; see `next_free`."""
    return next_free(first, lambda path: not path.exists(), suffix)


def next_free_folder(first: Path, manifest: Manifest) -> Path:
    """Return the first of NAME, NAME-2, … that has no manifest or one that matches."""

    def is_free(folder: Path) -> bool:
        found = read_manifest(folder, type(manifest))
        return found is None or found.matches(manifest)

    return next_free(first, is_free)


def default_output(model: Path, kind: str) -> Path:
    """Return where a command writes by default: RUN/KIND for a run, NAME-KIND in the working directory otherwise."""
    name = model.resolve().name if model.is_dir() else model.name.partition("@")[0]  # without the revision of a hub id
    return model / kind if RunFolder(model).config.is_file() else Path(f"{name}-{kind}")


def check_folder(folder: Path, manifest: Manifest) -> None:
    """Raise UserError if a folder holds images made with other settings, or other files and no manifest."""
    found = read_manifest(folder, type(manifest))
    if found is None:
        check_new(folder)
    elif not found.matches(manifest):
        raise UserError(f"{folder}: holds images made with other settings. Choose another folder with --out.")


def check_new(folder: Path) -> None:
    """Raise UserError if a folder that is about to be created exists and is not empty."""
    children = folder.iterdir() if folder.is_dir() else [folder] if folder.exists() else []
    if not all(files.is_leftover(child.name) for child in children):
        raise UserError(f"{folder}: exists and is not empty. Choose another folder with --out.")


def check_new_picture(path: Path) -> None:
    """Raise UserError if a picture that is about to be written exists, or is not named as a PNG."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {path}: pictures are written as PNG. Give a name that ends in .png.")
    check_new_file(path)


def check_new_file(path: Path) -> None:
    """Raise UserError if a file that is about to be written exists."""
    if path.exists():
        raise UserError(f"{path}: already exists. Choose another name or delete it.")


def image_path(folder: Path, number: int, image_format: ImageFormat = "png") -> Path:
    """Return the path of image `number`."""
    return folder / "images" / f"{number:06d}.{image_format}"


def is_complete_image(path: Path, size: tuple[int, int] | None = None, channels: int = 3) -> bool:
    """Return whether a PNG or WebP is written completely, without decoding it.

    If a (height, width) is given, its size and, for a PNG, its number of channels must be right too.
    """
    if not path.is_file():
        return False
    data, header = path.read_bytes(), _PNG_START
    if path.suffix == ".webp":
        return _is_complete_webp(data, size)
    if size:
        height, width = size
        header += width.to_bytes(4, "big") + height.to_bytes(4, "big") + _PNG_MODES[channels]
    return data.startswith(header) and data.endswith(_PNG_END)


def _is_complete_webp(data: bytes, size: tuple[int, int] | None) -> bool:
    if data[:4] != b"RIFF" or int.from_bytes(data[4:8], "little") + 8 != len(data):
        return False
    try:
        with Image.open(io.BytesIO(data)) as image:
            return size is None or image.size == size[::-1]
    except IMAGE_ERRORS:
        return False


def write_npz(folder: Path, count: int) -> Path:
    """Write all images of a folder to samples.npz, unless it exists: `arr_0`, uint8 (N, H, W, C). Return its path."""
    path = folder / "samples.npz"
    if path.is_file():
        return path
    shape = (count, *load_image(image_path(folder, 0)).movedim(0, 2).shape)
    with (
        files.atomic_write(path) as partial,
        zipfile.ZipFile(partial, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for number in range(count):
            file.write(load_image(image_path(folder, number)).movedim(0, 2).contiguous().numpy().tobytes())
    return path


def write_grids(
    folder: Path,
    count: int,
    labels: Sequence[int] | None,
    class_names: Sequence[str],
    image_format: ImageFormat = "png",
) -> None:
    """Write grid.png of the first images in a folder and, if they have labels, classes.png with one row per class."""
    shown = min(count, _GRID_IMAGES)
    pictures = [load_image(image_path(folder, number, image_format)) for number in range(shown)]
    save_grid(folder / "grid.png", torch.stack(pictures), columns=max(1, round(shown**0.5)))
    if labels is None:
        return
    rows = {}
    for label in list(dict.fromkeys(labels))[:_MAX_CLASS_ROWS]:
        numbers = [number for number, found in enumerate(labels) if found == label][:_CLASS_ROW_IMAGES]
        unique = class_names.count(class_names[label]) == 1
        name = class_names[label] if unique else f"{class_names[label]} ({label})"
        rows[name] = torch.stack([load_image(image_path(folder, number, image_format)) for number in numbers])
    save_rows(folder / "classes.png", rows)

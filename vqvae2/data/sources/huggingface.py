"""Data sets of the Hugging Face Hub: `huggingface:NAME`, or `huggingface:NAME:SPLIT`. The default split is `train`."""

from pathlib import Path
from typing import Any

from PIL import Image

from vqvae2.data.image_io import UnreadableImageError
from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.base import absolute_path
from vqvae2.data.sources.named import NamedSource
from vqvae2.errors import UserError

_PREFIX = "huggingface:"


class HuggingFaceSource(NamedSource):
    """The first image column of a data set, with the first ClassLabel column as labels.

    NAME can also be a folder written by `save_to_disk`. Requires the package `datasets`, which downloads and caches.
    """

    prefix = _PREFIX

    @classmethod
    def absolute(cls, path: str) -> str:
        name = path.removeprefix(_PREFIX)
        return _PREFIX + absolute_path(name) if _is_saved(name) else path

    @classmethod
    def load(cls, path: str) -> Any:
        return _image_column(_open(path), path)

    @classmethod
    def scan(cls, path: str) -> ImageIndex:
        table = _open(path)
        _image_column(table, path)
        numbers = [f"{number:08d}" for number in range(len(table))]
        column = next((name for name, kind in table.features.items() if type(kind).__name__ == "ClassLabel"), None)
        if column is None:
            return ImageIndex.build(numbers)
        classes = tuple(name.replace("/", "-") for name in table.features[column].names)
        names = [classes[label] if label >= 0 else None for label in table[column]]
        paths = [f"{c}/{n}" if c is not None else n for c, n in zip(names, numbers, strict=True)]
        return ImageIndex.build(paths, names, classes=classes)

    def open(self, number: int, size: tuple[int, int]) -> Path | bytes | Image.Image:
        del size
        image = self.item(number)
        if image is None or not (image["bytes"] or image["path"]):
            raise UnreadableImageError(self.describe(number), "the data set has no image in this row")
        return image["bytes"] or Path(image["path"])


def _is_saved(name: str) -> bool:
    """Return whether `save_to_disk` wrote the folder `name`."""
    return Path(name).expanduser().joinpath("state.json").is_file()


def _open(path: str) -> Any:
    try:
        import datasets  # an optional dependency  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"data.path: {path} needs the package `datasets`. Install it: pip install 'vqvae2[huggingface]'"
        ) from None
    name, _, split = path.removeprefix(_PREFIX).partition(":")
    try:
        if _is_saved(name):
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.path: `datasets` cannot open {name!r} ({reason}). Give huggingface:NAME or huggingface:NAME:SPLIT "
            "of a data set on the Hub, or a folder written by save_to_disk."
        ) from None


def _image_column(table: Any, path: str) -> Any:
    """Return the image column as encoded bytes or paths, to decode it with `read_image`."""
    import datasets  # pyright: ignore[reportMissingImports]

    column = next((name for name, kind in table.features.items() if type(kind).__name__ == "Image"), None)
    if column is None:
        raise UserError(f"data.path: no image column in {path}. Its columns are {', '.join(table.features)}.")
    return _Column(table.cast_column(column, datasets.Image(decode=False)), column)


class _Column:
    """One column of a table, indexed by row."""

    def __init__(self, table: Any, name: str) -> None:
        self.table, self.name = table, name

    def __getitem__(self, row: int) -> Any:
        return self.table[row][self.name]

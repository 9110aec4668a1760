"""Data sets of torchvision: `torchvision:CIFAR10`, or `torchvision:CIFAR10:FOLDER`. The default folder is `data`."""

import inspect
from typing import Any

from PIL import Image

from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.base import absolute_path
from vqvae2.data.sources.named import NamedSource
from vqvae2.errors import UserError

_PREFIX = "torchvision:"
_DEFAULT_FOLDER = "data"


class TorchvisionSource(NamedSource):
    """The training split of a torchvision data set, with its labels. Nothing is downloaded."""

    prefix = _PREFIX

    @classmethod
    def absolute(cls, path: str) -> str:
        name, _, root = path.removeprefix(_PREFIX).partition(":")
        return f"{_PREFIX}{name}:{absolute_path(root or _DEFAULT_FOLDER)}"

    @classmethod
    def load(cls, path: str) -> Any:
        return _open(path)

    @classmethod
    def scan(cls, path: str) -> ImageIndex:
        images = _open(path)
        labels = next(
            (getattr(images, name) for name in ("targets", "labels", "_labels") if hasattr(images, name)), None
        )
        numbers = [f"{number:08d}" for number in range(len(images))]
        if labels is None:
            return ImageIndex.build(numbers)
        values = [int(label) for label in labels]
        class_names = [str(name) for name in getattr(images, "classes", None) or range(max(values) + 1)]
        classes = tuple(name.replace("/", "-") for name in class_names)
        names = [classes[value] for value in values]
        return ImageIndex.build([f"{c}/{n}" for c, n in zip(names, numbers, strict=True)], names, classes=classes)

    def open(self, number: int, size: tuple[int, int]) -> Image.Image:
        del size
        item = self.item(number)
        return item[0] if isinstance(item, tuple) else item


def _open(path: str) -> Any:
    import torchvision.datasets  # slow to import, used by few runs

    name, _, root = path.removeprefix(_PREFIX).partition(":")
    kind = getattr(torchvision.datasets, name, None)
    if not (isinstance(kind, type) and issubclass(kind, torchvision.datasets.VisionDataset)):
        raise UserError(
            f"data.path: torchvision has no data set {name!r}. Give the name of a class in torchvision.datasets."
        )
    options = inspect.signature(kind).parameters
    folder = root or _DEFAULT_FOLDER
    settings: dict[str, Any] = {"root": folder} if "root" in options else {}
    if "train" in options:
        settings["train"] = True
    elif "split" in options:
        settings["split"] = "train"
    try:
        return kind(**settings)
    except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:
        fix = "Give"
        if "download" in options:
            arguments = "".join(f", {key}={value!r}" for key, value in settings.items() if key != "root")
            fix = (
                f'Download it with `python -c "import torchvision; '
                f'torchvision.datasets.{name}({folder!r}{arguments}, download=True)"`, or give'
            )
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.path: torchvision cannot open {name} in the folder {folder!r} ({reason}). "
            f"{fix} its folder: torchvision:{name}:FOLDER"
        ) from None

"""What sources have in common that another library opens by a name: `PREFIX:NAME…`."""

from abc import abstractmethod
from typing import Any, ClassVar

from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.base import Source


class NamedSource(Source):
    """Opens the library's own object when the first image is asked for, in each process anew."""

    prefix: ClassVar[str]
    keeps_index = False

    def __init__(self, path: str, index: ImageIndex) -> None:
        super().__init__(path, index)
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}  # a worker opens the files for itself

    @classmethod
    def matches(cls, path: str) -> bool:
        return path.startswith(cls.prefix)

    @classmethod
    @abstractmethod
    def load(cls, path: str) -> Any:
        """The library's images, by number; UserError where it cannot open them."""

    def item(self, number: int) -> Any:
        """What the library holds for an image: the end of its name is the library's number."""
        if self._opened is None:
            self._opened = self.load(self.path)
        return self._opened[int(self.index.names[number].rpartition("/")[2])]

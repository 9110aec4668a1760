"""Base class of sources that another library opens by name: `PREFIX:NAME`."""

from abc import abstractmethod
from typing import Any, ClassVar

from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.base import Source


class NamedSource(Source):
    """Source backed by a data set object of another library. Each process opens it at its first read."""

    prefix: ClassVar[str]
    caches_index = False

    def __init__(self, path: str, index: ImageIndex) -> None:
        super().__init__(path, index)
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}  # workers open the files on their own

    @classmethod
    def matches(cls, path: str) -> bool:
        return path.startswith(cls.prefix)

    @classmethod
    @abstractmethod
    def load(cls, path: str) -> Any:
        """Open the data set with the library. The result is indexed by number.

        Raises:
            UserError: If the library cannot open it.
        """

    def item(self, number: int) -> Any:
        """Return the library's object for an image. Its number in the library is the last part of its name."""
        if self._opened is None:
            self._opened = self.load(self.path)
        return self._opened[int(self.index.names[number].rpartition("/")[2])]

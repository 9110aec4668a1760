"""Code maps, the only thing that autoencoders, code stores and priors have in common."""

from typing import Annotated

from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from vqvae2.config import Config

Count = Annotated[int, Field(ge=1)]
CodeMaps = tuple[Int[Tensor, "b _ _"], ...]  # integer maps, finest level first


class MapSpec(Config):
    """The code maps of one level: how many codes there are, and the size of a map."""

    codebook_size: Count
    height: Count
    width: Count

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def num_codes(self) -> int:
        """Codes in one map."""
        return self.height * self.width

"""Types that autoencoders, code stores and priors share: code maps and their shapes."""

from typing import Annotated

from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from vqvae2.config import Config

PositiveInt = Annotated[int, Field(ge=1, le=2**24)]
CodeMaps = tuple[Int[Tensor, "b _ _"], ...]  # integer maps, finest level first


class MapSpec(Config):
    """Codebook size and spatial size of one level's code maps."""

    codebook_size: PositiveInt
    height: PositiveInt
    width: PositiveInt

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of a map."""
        return self.height, self.width

    @property
    def num_codes(self) -> int:
        """Number of codes in a map, height × width."""
        return self.height * self.width

"""The processes that `accelerate launch` or `torchrun` started; a single one without a launcher."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState

from vqvae2.errors import UserError


def processes() -> PartialState:
    """Return Accelerate's state of this process. Without a GPU, processes communicate over gloo.

    Raises:
        UserError: If Accelerate does not accept its environment variables.
    """
    with accelerate_errors():
        return PartialState(cpu=not torch.accelerator.is_available())


@contextmanager
def accelerate_errors() -> Iterator[None]:
    """Convert any error of starting Accelerate to a UserError if its environment variables are set."""
    variables = sorted(name for name in os.environ if name.startswith("ACCELERATE_"))
    try:
        yield
    except Exception as error:
        if not variables:
            raise
        raise UserError(f"{', '.join(variables)}: Accelerate cannot start ({error}). Unset the variables.") from error

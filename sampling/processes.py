"""The processes that `accelerate launch` or `torchrun` started; a single one without a launcher."""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import ParamSpec

import torch
from accelerate import PartialState

from vqvae2.distributed import is_distributed
from vqvae2.errors import UserError

P = ParamSpec("P")


def processes() -> PartialState:
    """Return Accelerate's state of this process. Without a GPU, processes communicate over gloo.

    Raises:
        UserError: If Accelerate does not accept its environment variables.
    """
    with accelerate_errors():
        state = PartialState(cpu=not torch.accelerator.is_available())
    if is_distributed():
        _leave_at_exit()
    return state


@cache
def _leave_at_exit() -> None:
    """Leave the process group when Python exits. Without this, gloo's threads can abort a process that ends first."""
    atexit.register(lambda: torch.distributed.destroy_process_group() if is_distributed() else None)


def on_main_process(function: Callable[P, object], *arguments: P.args, **named: P.kwargs) -> None:
    """Call a function on the main process only. It must not communicate with the other processes."""
    if processes().is_main_process:
        function(*arguments, **named)


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

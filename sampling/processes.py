"""The processes that `accelerate launch` or `torchrun` started; a single one without a launcher."""

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Return Accelerate's state of this process. Without a GPU, processes communicate over gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())

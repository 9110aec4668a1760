"""The processes that share a job, as `accelerate launch` or `torchrun` started them; one without a launcher."""

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Accelerate's view of them; without a GPU they talk over gloo, which Accelerate does only when told."""
    return PartialState(cpu=not torch.accelerator.is_available())

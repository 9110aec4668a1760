"""Sums over processes for library code, which knows one device and no launcher: nothing to do on a single process."""

import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether this process is one of several that work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def get_rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if is_distributed() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Add `tensor` up over all processes, in place, and return it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor

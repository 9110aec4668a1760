"""Thin wrappers around `torch.distributed` that also work without an initialized process group."""

import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Return whether a process group with more than one process is initialized."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def get_rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks in place and return it. Do nothing in a single process."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor

"""How much memory sampling takes, found before it is taken: a walk's buffers on the meta device, which has none."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqvae2.priors import Prior
from vqvae2.priors.toom_cook import IncrementalRowConv

_SHARE = 0.5  # of the free memory that walks may fill; the rest is for what comes and goes
_FLOAT = 4  # bytes


def batch_that_fits(prior: Prior, wanted: int, guided: bool, memory: float | None) -> int:
    """How many of `wanted` images one level can sample at once in `memory` GiB, half of what is free where None."""
    if wanted <= 1:
        return wanted
    device = next(prior.parameters()).device
    budget = free_bytes(device) * _SHARE if memory is None else memory * 2**30
    one, two = walk_bytes(prior, 1), walk_bytes(prior, 2)
    each, once = two - one, 2 * one - two  # weights are folded once, whatever the batch
    noise = prior.spec.level.width * prior.spec.level.codebook_size * _FLOAT
    return min(wanted, int((budget - once) // (each * (2 if guided else 1) + noise)))


def walk_bytes(prior: Prior, batch: int) -> int:
    """Bytes that the buffers, caches and folded weights of a walk over `batch` maps fill, measured without filling."""
    with torch.device("meta"):
        twin: Prior = prior.config.build(prior.spec)
    twin.eval().requires_grad_(False)
    coarser = tuple(torch.zeros(batch, *level.shape, dtype=torch.int64, device="meta") for level in prior.spec.coarser)
    labels = torch.zeros(batch, dtype=torch.int64, device="meta") if prior.spec.num_classes else None
    return _held(twin.incremental_decoder(batch, coarser, labels))


def free_bytes(device: torch.device) -> float:
    """Free memory of a GPU, or this process's part of what the machine has free; infinite where it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return float("inf")
    lines = (line.split() for line in meminfo.read_text(encoding="utf-8").splitlines())
    kibibytes = {words[0].rstrip(":"): int(words[1]) for words in lines}
    return kibibytes["MemAvailable"] * 1024 / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _held(steps: object) -> int:
    """Bytes of all tensors that a walk reaches, each storage once, and of the finished rows that it will keep; the
    network's own weights are left out."""
    storages: dict[int, int] = {}
    to_come = 0
    seen: set[int] = set()
    found: list[Any] = [steps]
    while found:
        value = found.pop()
        if id(value) in seen or isinstance(value, nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        elif isinstance(value, Mapping):
            found += value.values()
        elif isinstance(value, list | tuple):
            found += value
        elif hasattr(value, "__dict__"):
            found += vars(value).values()
            to_come += _finished_rows(value) if isinstance(value, IncrementalRowConv) else 0
    return sum(storages.values()) + to_come


def _finished_rows(walk: IncrementalRowConv) -> int:
    """Bytes of the transformed rows that a walk keeps, once there are as many as it reaches."""
    return walk.max_cache_bytes

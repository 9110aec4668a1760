"""Estimate the memory that sampling needs before it is allocated, with buffers on the meta device."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqvae2.priors import Prior
from vqvae2.priors.toom_cook import IncrementalRowConv

_FREE_MEMORY_FRACTION = 0.5  # for buffers and caches; the rest is for temporary tensors
_FLOAT_BYTES = 4


def batch_that_fits(prior: Prior, wanted: int, guided: bool, memory: float | None) -> int:
    """Return how many of `wanted` images fit at once into `memory` GiB, or into half of the free memory if None.

    The result may be 0 or negative if not even one image fits.
    """
    if wanted <= 1:
        return wanted
    device = next(prior.parameters()).device
    budget = free_bytes(device) * _FREE_MEMORY_FRACTION if memory is None else memory * 2**30
    if math.isinf(budget):
        return wanted
    one, two = decoder_bytes(prior, 1), decoder_bytes(prior, 2)
    per_image, fixed = two - one, 2 * one - two  # folded weights do not depend on the batch size
    noise = prior.spec.level.width * prior.spec.level.codebook_size * _FLOAT_BYTES
    return min(wanted, int((budget - fixed) // (per_image * (2 if guided else 1) + noise)))


def decoder_bytes(prior: Prior, batch: int) -> int:
    """Return the bytes of an incremental decoder's buffers, caches and folded weights, without allocating them."""
    with torch.device("meta"):
        twin: Prior = prior.config.build(prior.spec)
    twin.eval().requires_grad_(False)
    coarser = tuple(torch.zeros(batch, *level.shape, dtype=torch.int64, device="meta") for level in prior.spec.coarser)
    labels = torch.zeros(batch, dtype=torch.int64, device="meta") if prior.spec.num_classes else None
    wavefront = None
    if next(prior.parameters()).device.type != "cuda":
        wavefront = twin.wavefront_decoder(batch, prior.spec.level.height, coarser, labels)
    return _reachable_bytes(wavefront or twin.incremental_decoder(batch, coarser, labels))


def free_bytes(device: torch.device) -> float:
    """Return the free memory of a GPU, or this process's share of the machine's; infinity if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return math.inf
    lines = (line.split() for line in meminfo.read_text(encoding="utf-8").splitlines())
    kibibytes = {words[0].rstrip(":"): int(words[1]) for words in lines}
    return kibibytes.get("MemAvailable", math.inf) * 1024 / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _reachable_bytes(decoder: object) -> int:
    """Return the bytes of all tensors that an object reaches, except modules, counting each storage once."""
    storages: dict[int, int] = {}
    not_yet_allocated = 0
    seen: set[int] = set()
    pending: list[Any] = [decoder]
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        elif isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
        elif hasattr(value, "__dict__"):
            pending += vars(value).values()
            not_yet_allocated += value.max_cache_bytes if isinstance(value, IncrementalRowConv) else 0
    return sum(storages.values()) + not_yet_allocated

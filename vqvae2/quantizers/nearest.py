"""Nearest codebook vectors in bounded memory, and k-means on top of it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A block of distances that stays in a processor's cache is fastest there; a GPU wants large products.
_CPU_BLOCK_BYTES = 4 * 2**20
_GPU_BLOCK_BYTES = 256 * 2**20


@torch.no_grad()
def nearest(
    rows: Float[Tensor, "n d"], vectors: Float[Tensor, "k d"], block_bytes: int | None = None
) -> Int[Tensor, " n"]:
    """Index of the vector nearest to each row in Euclidean distance (van den Oord et al. 2017, eq. 1).

    The n × k distances are made in blocks of at most `block_bytes`, so memory does not grow with the number of rows.
    """
    if block_bytes is None:
        block_bytes = _CPU_BLOCK_BYTES if rows.device.type == "cpu" else _GPU_BLOCK_BYTES
    block = max(1, block_bytes // (rows.element_size() * len(vectors)))
    half_norms = vectors.square().sum(1) / 2  # argmin ‖x − e‖² = argmin ‖e‖² / 2 − x·e
    result = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        torch.argmin(torch.addmm(half_norms, part, vectors.T, alpha=-1), dim=1, out=result[start : start + block])
    return result


@torch.no_grad()
def cluster_sums(
    rows: Float[Tensor, "n d"], codes: Int[Tensor, " n"], count: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k d"]]:
    """How many rows have each of `count` codes, and the sum of those rows."""
    counts = torch.bincount(codes, minlength=count).to(rows.dtype)
    sums = torch.zeros(count, rows.shape[1], dtype=rows.dtype, device=rows.device).index_add_(0, codes, rows)
    return counts, sums


@torch.no_grad()
def kmeans(
    rows: Float[Tensor, "n d"], count: int, iterations: int, generator: torch.Generator
) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"]]:
    """Lloyd's algorithm: `count` centres of `rows` and how many rows each one has.

    It starts from random rows; a centre that loses all its rows starts again from a random one.
    """
    centres = rows[_random_rows(len(rows), count, generator)]
    counts = torch.zeros(count, device=rows.device)
    for _ in range(iterations):
        counts, sums = cluster_sums(rows, nearest(rows, centres), count)
        fresh = rows[_random_rows(len(rows), count, generator)]
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], fresh)
    return centres, counts


def _random_rows(available: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` random indices, all different where there are enough."""
    if available >= count:
        return torch.randperm(available, generator=generator)[:count]
    return torch.randint(available, (count,), generator=generator)

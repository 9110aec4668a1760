"""Nearest-neighbor lookup in bounded memory, and k-means clustering."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

# On a CPU, a block of distances should fit into the cache; a GPU needs large matrix products.
_CPU_BLOCK_BYTES = 4 * 2**20
_GPU_BLOCK_BYTES = 256 * 2**20


@torch.no_grad()
def nearest_codes(
    vectors: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"], block_bytes: int | None = None
) -> Int[Tensor, " n"]:
    """Return the index of the nearest code to each vector in Euclidean distance (van den Oord et al. 2017, eq. 1).

    The n × k distances are computed in blocks of at most `block_bytes`, so memory does not grow with n.
    """
    if torch.compiler.is_compiling():  # one node of the graph; otherwise blocks and the precision would be lost
        return torch.ops.vqvae2.nearest_codes(vectors, codebook)
    return _nearest_codes(vectors, codebook, block_bytes)


def _nearest_codes(vectors: Tensor, codebook: Tensor, block_bytes: int | None = None) -> Tensor:
    if block_bytes is None:
        block_bytes = _CPU_BLOCK_BYTES if vectors.device.type == "cpu" else _GPU_BLOCK_BYTES
    block_rows = max(1, block_bytes // (vectors.element_size() * len(codebook)))
    codes = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    with _without_tf32(vectors.device):
        offset = _common_offset(codebook)
        codebook = codebook - offset
        # argmin ‖x − e‖² = argmin ‖e − o‖² / 2 − (x − o)·(e − o)
        half_norms = codebook.square().sum(1) / 2 + codebook @ offset
        for start in range(0, len(vectors), block_rows):
            block = vectors[start : start + block_rows]
            distances = torch.addmm(half_norms, block, codebook.T, alpha=-1)
            torch.argmin(distances, dim=1, out=codes[start : start + block_rows])
    return codes


def _common_offset(codebook: Float[Tensor, "k d"]) -> Float[Tensor, " d"]:
    """Return the mean vector if it is more than 4 times as long as deviations from it, otherwise zeros.

    A longer offset, which does not change distances, would cancel the digits in which they differ.
    """
    mean = codebook.mean(0)
    return torch.where(mean.square().sum() > 16 / 17 * codebook.square().sum(1).mean(), mean, 0.0)


# Not `torch.library.custom_op`, which imports the compiler and takes a second.
torch.library.define("vqvae2::nearest_codes", "(Tensor vectors, Tensor codebook) -> Tensor")
torch.library.impl("vqvae2::nearest_codes", "CompositeExplicitAutograd", _nearest_codes)


@torch.library.register_fake("vqvae2::nearest_codes")
def _(vectors: Tensor, codebook: Tensor) -> Tensor:
    return vectors.new_empty(len(vectors), dtype=torch.int64)


@contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    """Compute matrix products in float32 on CUDA. TF32, which training may allow, would assign other codes."""
    precision = torch.get_float32_matmul_precision()
    if device.type != "cuda" or precision == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def cluster_sums(
    vectors: Float[Tensor, "n d"], codes: Int[Tensor, " n"], codebook_size: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k d"]]:
    """Return the number of vectors assigned to each code, and their sums."""
    # Not `bincount`, which waits for a GPU. Sums of ones are exact.
    counts = vectors.new_zeros(codebook_size).index_add_(0, codes, vectors.new_ones(len(codes)))
    sums = vectors.new_zeros(codebook_size, vectors.shape[1]).index_add_(0, codes, vectors)
    return counts, sums


@torch.no_grad()
def kmeans(
    vectors: Float[Tensor, "n d"], num_clusters: int, iterations: int, generator: torch.Generator
) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"]]:
    """Cluster vectors with Lloyd's algorithm. Return the centers, and the number of vectors assigned to each.

    Centers start at random vectors. A center without vectors restarts at a random one. If there are at least as many
    centers as vectors, every vector is a center, and the other centers repeat them.
    """
    if num_clusters >= len(vectors):
        numbers = torch.arange(num_clusters, device=vectors.device)
        return vectors[numbers % len(vectors)], (numbers < len(vectors)).to(vectors.dtype)
    centers = vectors[_random_indices(len(vectors), num_clusters, generator)]
    counts = torch.zeros(num_clusters, device=vectors.device)
    for _ in range(iterations):
        counts, sums = cluster_sums(vectors, nearest_codes(vectors, centers), num_clusters)
        random_vectors = vectors[_random_indices(len(vectors), num_clusters, generator)]
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], random_vectors)
    return centers, counts


def _random_indices(available: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` random indices below `available`, distinct if possible."""
    if available >= count:
        return torch.randperm(available, generator=generator)[:count]
    return torch.randint(available, (count,), generator=generator)

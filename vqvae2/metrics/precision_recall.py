"""Fidelity and diversity from nearest neighbours in feature space, in memory that grows linearly with the images.

Precision and recall: Kynkäänniemi et al. 2019 (arXiv 1904.06991). Density and coverage: Naeem et al. 2020 (arXiv
2002.09797). A sample's ball reaches to its k-th nearest neighbour in its own set, itself not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vqvae2.errors import UserError

_BLOCK_BYTES = 128 * 2**20  # of one block of distances


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision, recall and coverage are shares in [0, 1]; density may exceed 1."""

    precision: float  # generated images inside a ball of the reference
    recall: float  # reference images inside a ball of the generated
    density: float  # balls of the reference around a generated image, over k
    coverage: float  # reference balls that hold a generated image


def precision_recall(
    generated: Float[Tensor, "n d"], reference: Float[Tensor, "m d"], k: int = 3, k_density: int = 5
) -> PrecisionRecall:
    """All four measures; `k` neighbours for precision and recall, `k_density` for density and coverage.

    Distances are float64. Raises UserError where the dimensions differ or a side has no k-th neighbour.
    """
    if generated.ndim != 2 or reference.ndim != 2 or generated.shape[1] != reference.shape[1]:
        raise UserError(f"features of shapes {tuple(generated.shape)} and {tuple(reference.shape)}; expected (N, D)")
    fewest = min(len(generated), len(reference))
    if min(k, k_density) < 1 or fewest <= max(k, k_density):
        raise UserError(f"{fewest} images; the {max(k, k_density)}th neighbour needs more than {max(k, k_density)}")
    if generated.device.type == "mps":  # has no float64
        generated, reference = generated.cpu(), reference.cpu()
    reference = reference.to(generated.device)
    # Distances do not depend on the origin, and a product loses fewer digits to features about it.
    origin = reference.double().mean(0)
    reference, generated = reference.double() - origin, generated.double() - origin

    reach, reach_density = _radii(reference, (k, k_density))
    (reach_generated,) = _radii(generated, (k,))
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    covered = torch.zeros_like(recalled)
    precise = inside = 0
    for first, distances in _blocks(generated, reference):
        own_reach = reach_generated[first : first + len(distances), None]
        precise += int((distances <= reach).any(1).sum())
        recalled |= (distances <= own_reach).any(0)
        within = distances < reach_density
        inside += int(within.sum())
        covered |= within.any(0)
    n = len(generated)
    return PrecisionRecall(
        precision=precise / n,
        recall=float(recalled.double().mean()),
        density=inside / (k_density * n),
        coverage=float(covered.double().mean()),
    )


def _radii(features: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Squared distance from each feature to its k-th nearest other, for each k."""
    nearest = []
    for first, distances in _blocks(features, features):
        rows = torch.arange(len(distances), device=features.device)
        distances[rows, rows + first] = torch.inf
        nearest.append(distances.topk(max(ks), dim=1, largest=False).values)
    table = torch.cat(nearest)
    return [table[:, k - 1] for k in ks]


def _blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, squared distances from a block of rows to all columns), block by block."""
    height = max(1, _BLOCK_BYTES // (8 * len(columns)))
    squares = columns.square().sum(1)
    for first in range(0, len(rows), height):
        block = rows[first : first + height]
        distances = torch.addmm(squares, block, columns.T, alpha=-2)
        yield first, distances.add_(block.square().sum(1, keepdim=True)).clamp_(min=0)

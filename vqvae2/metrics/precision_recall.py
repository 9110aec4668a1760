"""Precision, recall, density and coverage from nearest neighbors in feature space, in linear memory.

Precision and recall: Kynkäänniemi et al. 2019 (arXiv 1904.06991). Density and coverage: Naeem et al. 2020 (arXiv
2002.09797). The ball of a sample has the distance to its k-th nearest neighbor in its own set as its radius.
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
    """Precision, recall and coverage are in [0, 1]. Density is 0 or more and can exceed 1."""

    precision: float  # fraction of generated images inside a ball of the reference
    recall: float  # fraction of reference images inside a ball of the generated images
    density: float  # mean number of reference balls around a generated image, divided by k
    coverage: float  # fraction of reference balls that contain a generated image


def precision_recall(
    generated: Float[Tensor, "n d"], reference: Float[Tensor, "m d"], k: int = 3, k_density: int = 5
) -> PrecisionRecall:
    """Compute all four metrics in float64, with `k` neighbors, or `k_density` neighbors for density and coverage.

    Raises:
        UserError: If the dimensions differ or a side has too few images for a k-th neighbor.
    """
    if generated.ndim != 2 or reference.ndim != 2 or generated.shape[1] != reference.shape[1]:
        shapes = f"{tuple(generated.shape)} and {tuple(reference.shape)}"
        raise UserError(f"precision and recall: expected features (N, D) and (M, D), got {shapes}")
    fewest, most_neighbors = min(len(generated), len(reference)), max(k, k_density)
    if min(k, k_density) < 1 or fewest <= most_neighbors:
        raise UserError(f"precision and recall need more than {most_neighbors} images per side, got {fewest}")
    if generated.device.type == "mps":  # no float64
        generated, reference = generated.cpu(), reference.cpu()
    reference = reference.to(generated.device)
    # Distances do not depend on the origin, and centered features lose fewer digits in the product.
    origin = reference.double().mean(0)
    reference, generated = reference.double() - origin, generated.double() - origin

    radii, density_radii = _squared_radii(reference, (k, k_density))
    (generated_radii,) = _squared_radii(generated, (k,))
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    covered = torch.zeros_like(recalled)
    num_precise = num_inside = 0
    for first, distances in _distance_blocks(generated, reference):
        own_radii = generated_radii[first : first + len(distances), None]
        num_precise += int((distances <= radii).any(1).sum())
        recalled |= (distances <= own_radii).any(0)
        inside = distances < density_radii
        num_inside += int(inside.sum())
        covered |= inside.any(0)
    n = len(generated)
    return PrecisionRecall(
        precision=num_precise / n,
        recall=float(recalled.double().mean()),
        density=num_inside / (k_density * n),
        coverage=float(covered.double().mean()),
    )


def _squared_radii(features: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Return the squared distance of each feature to its k-th nearest neighbor, excluding itself, for each k."""
    nearest = []
    for first, distances in _distance_blocks(features, features):
        rows = torch.arange(len(distances), device=features.device)
        distances[rows, rows + first] = torch.inf
        nearest.append(distances.topk(max(ks), dim=1, largest=False).values)
    table = torch.cat(nearest)
    return [table[:, k - 1] for k in ks]


def _distance_blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first row, squared distances of a block of rows to all columns)."""
    height = max(1, _BLOCK_BYTES // (8 * len(columns)))
    squares = columns.square().sum(1)
    for first in range(0, len(rows), height):
        block = rows[first : first + height]
        distances = torch.addmm(squares, block, columns.T, alpha=-2)
        yield first, distances.add_(block.square().sum(1, keepdim=True)).clamp_(min=0)

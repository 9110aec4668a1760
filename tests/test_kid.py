"""Test KID against torch-fidelity with the same seed, and against its definition."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from vqvae2.errors import UserError
from vqvae2.metrics.kid import kernel_inception_distance, squared_mmd


def sets(n: int = 90, m: int = 70, dims: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, dims, generator=generator), torch.rand(m, dims, generator=generator) ** 1.5


@pytest.mark.parametrize(("subsets", "size", "seed"), [(10, 40, 2020), (3, 70, 7)])
def test_kid_matches_torch_fidelity(subsets: int, size: int, seed: int) -> None:
    a, b = sets()
    expected = kid_features_to_metric(
        a.double(), b.double(), kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    result = kernel_inception_distance(a, b, subsets, size, seed)
    assert result.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert result.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-6, abs=1e-12)
    assert (result.subsets, result.subset_size) == (subsets, size)


def test_squared_mmd_matches_the_definition() -> None:
    x, y = (side[:5].numpy().astype(np.float64) for side in sets())

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / len(a) + 1) ** 3

    within = sum(k(z[i], z[j]) for z in (x, y) for i in range(5) for j in range(5) if i != j) / 20
    between = sum(k(a, b) for a in x for b in y) / 25
    assert squared_mmd(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(within - 2 * between, rel=1e-12)


def test_kid_is_near_zero_for_equal_distributions() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(600, 8, generator=generator), torch.randn(600, 8, generator=generator)
    same, other = kernel_inception_distance(a, b, 50, 100), kernel_inception_distance(a, b + 0.5, 50, 100)
    assert abs(same.mean) < 0.2 * other.mean
    assert same.std > 0


def test_subset_size_is_limited_by_set_size_and_result_depends_on_seed() -> None:
    a, b = sets()
    assert kernel_inception_distance(a, b, 2, 1000).subset_size == 70
    assert kernel_inception_distance(a, b, 4, 20, seed=1) == kernel_inception_distance(a, b, 4, 20, seed=1)
    assert kernel_inception_distance(a, b, 4, 20, seed=1) != kernel_inception_distance(a, b, 4, 20, seed=2)


def test_mismatched_features_and_too_few_images_raise() -> None:
    a, b = sets()
    with pytest.raises(UserError, match=r"\(90, 16\) and \(70, 15\)"):
        kernel_inception_distance(a, b[:, 1:])
    with pytest.raises(UserError, match="at least 2 images"):
        kernel_inception_distance(a[:1], b)

"""Test precision and recall against torch-fidelity, and density and coverage against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_prc import prc_features_to_metric

from vqvae2.errors import UserError
from vqvae2.metrics import precision_recall as module
from vqvae2.metrics.precision_recall import precision_recall


def sets(n: int = 80, m: int = 60, dims: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dims, generator=generator) * 1.3 + 5, torch.randn(m, dims, generator=generator) + 5.5


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_match_torch_fidelity(k: int) -> None:
    generated, reference = sets()
    expected = prc_features_to_metric(generated.double(), reference.double(), prc_neighborhood=k, verbose=False)
    result = precision_recall(generated, reference, k=k)
    assert result.precision == pytest.approx(expected["precision"], abs=1e-6)
    assert result.recall == pytest.approx(expected["recall"], abs=1e-6)
    assert 0 < result.precision < 1
    assert 0 < result.recall < 1


def density_and_coverage(generated: np.ndarray, reference: np.ndarray, k: int) -> tuple[float, float]:
    """Compute density and coverage by equations 2 and 3 of Naeem et al. 2020."""

    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    radii = np.sort(distance(reference, reference), axis=1)[:, k]
    inside = distance(generated, reference) < radii
    return inside.sum() / (k * len(generated)), inside.any(0).mean()


@settings(deadline=None, max_examples=20)
@given(st.integers(6, 40), st.integers(6, 40), st.integers(1, 5), st.integers(0, 1000))
def test_density_and_coverage_match_their_definitions(n: int, m: int, k: int, seed: int) -> None:
    generated, reference = sets(n, m, seed=seed)
    density, coverage = density_and_coverage(generated.double().numpy(), reference.double().numpy(), k)
    result = precision_recall(generated, reference, k_density=k)
    assert result.density == pytest.approx(density)
    assert result.coverage == pytest.approx(coverage)


def test_block_size_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = precision_recall(*sets())
    monkeypatch.setattr(module, "_BLOCK_BYTES", 8 * 60 * 7)
    assert precision_recall(*sets()) == expected


def test_equal_and_disjoint_sets() -> None:
    generated, _ = sets()
    same, far = precision_recall(generated, generated), precision_recall(generated, generated + 1000)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_duplicate_image_counts_as_neighbor() -> None:
    reference = torch.tensor([[0.0], [0.0], [10.0], [20.0], [30.0], [40.0], [50.0]])
    generated = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    # With k = 1 the ball of a duplicate has radius 0. It contains an equal generated image for precision (≤) only.
    result = precision_recall(generated, reference, k=1, k_density=1)
    assert result.precision == pytest.approx(7 / 7)
    assert result.density == pytest.approx(6 / 7)


def test_mismatched_features_and_too_few_images_raise() -> None:
    generated, reference = sets()
    with pytest.raises(UserError, match="expected"):
        precision_recall(generated, reference[:, 1:])
    with pytest.raises(UserError, match="more than 5 images per side, got 5"):
        precision_recall(generated[:5], reference)

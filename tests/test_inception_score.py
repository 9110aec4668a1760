"""Test the Inception score against torch-fidelity, for any order and batch size, and over two processes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_isc import isc_features_to_metric

from tests.inception_fixture import two_processes
from vqvae2.errors import UserError
from vqvae2.metrics.inception_score import InceptionScore, InceptionScoreResult, inception_score


def logits(count: int = 47, classes: int = 20) -> torch.Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize(("splits", "seed"), [(1, 2020), (10, 2020), (7, 3)])
def test_score_matches_torch_fidelity(splits: int, seed: int) -> None:
    expected = isc_features_to_metric(logits(), splits, True, seed)
    result = inception_score(logits(), splits, seed)
    assert result.mean == pytest.approx(expected["inception_score_mean"], rel=1e-10)
    assert result.std == pytest.approx(expected["inception_score_std"], rel=1e-8, abs=1e-10)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(47)), st.integers(1, 47))
def test_score_is_independent_of_order_and_batch_size(order: list[int], batch: int) -> None:
    score = InceptionScore(47, 10, classes=20)
    for start in range(0, 47, batch):
        indices = torch.tensor(order[start : start + batch])
        score.update(logits()[indices], indices)
    assert score.compute() == pytest.approx(inception_score(logits()), rel=1e-10)


def test_score_of_confident_and_uniform_predictions() -> None:
    confident = torch.full((40, 4), -1e4)
    confident[torch.arange(40), torch.arange(40) % 4] = 1e4
    assert inception_score(confident, 1).mean == pytest.approx(4)
    assert inception_score(torch.zeros(40, 4), 1).mean == pytest.approx(1)


def test_too_few_images_raise() -> None:
    with pytest.raises(UserError, match="10 splits need at least as many images, got 3"):
        inception_score(logits(3))
    score = InceptionScore(5, 1, classes=20)
    score.update(logits(4), torch.arange(4))
    with pytest.raises(UserError, match="expected 5 images, got 4"):
        score.compute()


def score_of_two_ranks() -> InceptionScoreResult:
    score = InceptionScore(47, 10, classes=20)
    indices = torch.arange(torch.distributed.get_rank(), 47, 2)
    score.update(logits()[indices], indices)
    score.all_reduce()
    return score.compute()


def test_all_reduce_over_two_processes_matches_one() -> None:
    for result in two_processes(score_of_two_ranks):
        assert np.allclose(result, inception_score(logits()), rtol=1e-10)

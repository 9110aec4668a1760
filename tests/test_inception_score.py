"""The Inception score against torch-fidelity, streamed, shuffled and shared."""

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
def test_is_the_number_of_torch_fidelity(splits: int, seed: int) -> None:
    expected = isc_features_to_metric(logits(), splits, True, seed)
    result = inception_score(logits(), splits, seed)
    assert result.mean == pytest.approx(expected["inception_score_mean"], rel=1e-10)
    assert result.std == pytest.approx(expected["inception_score_std"], rel=1e-8, abs=1e-10)


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(47)), st.integers(1, 47))
def test_order_and_batches_do_not_matter(order: list[int], batch: int) -> None:
    score = InceptionScore(47, 10, classes=20)
    for start in range(0, 47, batch):
        indices = torch.tensor(order[start : start + batch])
        score.update(logits()[indices], indices)
    assert score.compute() == pytest.approx(inception_score(logits()), rel=1e-10)


def test_sure_and_even_is_the_number_of_classes_and_unsure_is_one() -> None:
    sure = torch.full((40, 4), -1e4)
    sure[torch.arange(40), torch.arange(40) % 4] = 1e4
    assert inception_score(sure, 1).mean == pytest.approx(4)
    assert inception_score(torch.zeros(40, 4), 1).mean == pytest.approx(1)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UserError, match="10 splits need at least as many images, got 3"):
        inception_score(logits(3))
    score = InceptionScore(5, 1, classes=20)
    score.update(logits(4), torch.arange(4))
    with pytest.raises(UserError, match="expected 5 images, got 4"):
        score.compute()


def halves() -> InceptionScoreResult:
    score = InceptionScore(47, 10, classes=20)
    indices = torch.arange(torch.distributed.get_rank(), 47, 2)
    score.update(logits()[indices], indices)
    score.all_reduce()
    return score.compute()


def test_two_processes_give_the_value_of_one() -> None:
    for result in two_processes(halves):
        assert np.allclose(result, inception_score(logits()), rtol=1e-10)

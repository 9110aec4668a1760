"""Test codebook usage against NumPy, over batches and processes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.inception_fixture import two_processes
from vqvae2.errors import UserError
from vqvae2.metrics.codebook_usage import CodebookUsage


@given(st.lists(st.integers(0, 7), min_size=1, max_size=60), st.integers(1, 60))
def test_matches_numpy_for_any_split_into_batches(codes: list[int], cut: int) -> None:
    usage = CodebookUsage(8)
    for part in (codes[:cut], codes[cut:]):
        usage.update(torch.tensor(part, dtype=torch.int32))
    probabilities = np.bincount(codes, minlength=8) / len(codes)
    entropy = -sum(p * np.log(p) for p in probabilities if p)
    assert usage.total == len(codes)
    assert usage.usage == pytest.approx(np.count_nonzero(probabilities) / 8)
    assert usage.entropy == pytest.approx(entropy, abs=1e-12)
    assert usage.perplexity == pytest.approx(np.exp(entropy))
    assert 1 <= usage.perplexity <= 8 + 1e-9


def test_perplexity_of_uniform_and_single_code_usage() -> None:
    uniform, single = CodebookUsage(512), CodebookUsage(512)
    uniform.update(torch.arange(512).reshape(2, 16, 16))
    single.update(torch.full((3, 4), 7))
    assert uniform.perplexity == pytest.approx(512)
    assert uniform.usage == 1
    assert (single.perplexity, single.entropy, single.usage) == (1, 0, 1 / 512)


def test_perplexity_without_codes_is_nan() -> None:
    usage = CodebookUsage(4)
    usage.update(torch.empty(0, 3, dtype=torch.long))
    assert usage.usage == 0
    assert np.isnan(usage.entropy)
    assert np.isnan(usage.perplexity)


@pytest.mark.parametrize("code", [-1, 4])
def test_out_of_range_codes_raise_and_are_not_counted(code: int) -> None:
    usage = CodebookUsage(4)
    with pytest.raises(UserError, match="codes must be in 0 to 3"):
        usage.update(torch.tensor([0, code]))
    assert usage.total == 0
    with pytest.raises(UserError, match="must be integers"):
        usage.update(torch.zeros(3))
    with pytest.raises(UserError, match="at least 1"):
        CodebookUsage(0)


def reduced_counts() -> torch.Tensor:
    usage = CodebookUsage(5)
    usage.update(torch.tensor([[0, 1, 1], [2, 2, 4]])[torch.distributed.get_rank()])
    usage.all_reduce()
    return usage.counts


def test_all_reduce_sums_over_processes() -> None:
    for counts in two_processes(reduced_counts):
        assert counts.tolist() == [1, 2, 2, 0, 1]

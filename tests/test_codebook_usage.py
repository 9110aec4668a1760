"""Codebook usage against NumPy, by batches and by processes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.inception_fixture import two_processes
from vqvae2.errors import UserError
from vqvae2.metrics.codebook_usage import CodebookUsage


@given(st.lists(st.integers(0, 7), min_size=1, max_size=60), st.integers(1, 60))
def test_equals_numpy_for_any_split_into_batches(codes: list[int], cut: int) -> None:
    usage = CodebookUsage(8)
    for part in (codes[:cut], codes[cut:]):
        usage.update(torch.tensor(part, dtype=torch.int32))
    share = np.bincount(codes, minlength=8) / len(codes)
    entropy = -sum(p * np.log(p) for p in share if p)
    assert usage.total == len(codes)
    assert usage.usage == pytest.approx(np.count_nonzero(share) / 8)
    assert usage.entropy == pytest.approx(entropy, abs=1e-12)
    assert usage.perplexity == pytest.approx(np.exp(entropy))
    assert 1 <= usage.perplexity <= 8 + 1e-9


def test_even_use_is_the_size_and_a_single_code_is_one() -> None:
    even, single = CodebookUsage(512), CodebookUsage(512)
    even.update(torch.arange(512).reshape(2, 16, 16))
    single.update(torch.full((3, 4), 7))
    assert even.perplexity == pytest.approx(512)
    assert even.usage == 1
    assert (single.perplexity, single.entropy, single.usage) == (1, 0, 1 / 512)


def test_nothing_counted_is_nan() -> None:
    usage = CodebookUsage(4)
    usage.update(torch.empty(0, 3, dtype=torch.long))
    assert usage.usage == 0
    assert np.isnan(usage.entropy)
    assert np.isnan(usage.perplexity)


@pytest.mark.parametrize("code", [-1, 4])
def test_codes_outside_the_codebook_are_refused_and_not_counted(code: int) -> None:
    usage = CodebookUsage(4)
    with pytest.raises(UserError, match="codes must be in 0 to 3"):
        usage.update(torch.tensor([0, code]))
    assert usage.total == 0
    with pytest.raises(UserError, match="must be integers"):
        usage.update(torch.zeros(3))
    with pytest.raises(UserError, match="at least 1"):
        CodebookUsage(0)


def shared() -> torch.Tensor:
    usage = CodebookUsage(5)
    usage.update(torch.tensor([[0, 1, 1], [2, 2, 4]])[torch.distributed.get_rank()])
    usage.all_reduce()
    return usage.counts


def test_two_processes_add_up() -> None:
    for counts in two_processes(shared):
        assert counts.tolist() == [1, 2, 2, 0, 1]

"""Test sampling: filters against NumPy, the distribution, reproducibility, and the incremental sampler."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sampling import row_sampler
from sampling.logits import keep_top_k, keep_top_p, sample_codes
from sampling.params import LevelSamplingParams
from sampling.pipeline import VQVAE2Pipeline
from sampling.sample_level import Noise, sample_level
from tests.test_priors import build, inputs
from vqvae2 import AutoencoderConfig


@given(seed=st.integers(0, 999), k=st.integers(1, 12))
def test_top_k_keeps_the_k_largest(seed: int, k: int) -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed))
    kept = keep_top_k(logits, k).isfinite().numpy()
    assert (keep_top_k(logits.round(), k).isfinite().sum(1) == min(k, 9)).all(), "also of equal logits"
    expected = np.argsort(np.argsort(-logits.numpy())) < k
    np.testing.assert_array_equal(kept, expected)


@given(seed=st.integers(0, 999), threshold=st.floats(0.01, 1.0))
@settings(deadline=None)
def test_top_p_keeps_the_smallest_sufficient_set(seed: int, threshold: float) -> None:
    logits = 3 * torch.randn(4, 9, generator=torch.Generator().manual_seed(seed))
    kept = keep_top_p(logits, threshold).isfinite()
    probabilities = logits.double().softmax(1)
    for row, mask in zip(probabilities, kept, strict=True):
        assert row[mask].sum() >= threshold - 1e-5
        assert row[mask].sum() - row[mask].min() < threshold + 1e-5
        assert row[mask].min() >= row[~mask].max() if (~mask).any() else True


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_codes_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    count = 40_000
    uniform = Noise(0, [7], 0).draw(count)[0]
    codes = sample_codes(logits.expand(count, 4), uniform, LevelSamplingParams(temperature=temperature))
    found = np.bincount(codes.numpy(), minlength=4) / count
    expected = (logits / temperature).softmax(0).numpy()
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / count)


@given(seed=st.integers(0, 999), uniform=st.floats(0, 1, exclude_max=True, width=32))
@settings(deadline=None)
def test_a_code_is_the_first_whose_cumulative_probability_exceeds_the_variate(seed: int, uniform: float) -> None:
    logits = 4 * torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
    logits[0, torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:20]] = -torch.inf
    code = int(sample_codes(logits, torch.tensor([uniform]), LevelSamplingParams()))
    probabilities = np.exp(logits[0].double().numpy()) / np.exp(logits[0].double().numpy()).sum()
    assert probabilities[code] > 0
    # Numbered from the last code, the cumulative probability reaches the variate at the sampled code.
    assert probabilities[code + 1 :].sum() <= uniform + 1e-6
    assert probabilities[code:].sum() >= uniform - 1e-6


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-46, 1e-40, 1e-31, 1e-30, 1e-20])
def test_temperature_of_or_near_zero_is_argmax(temperature: float) -> None:
    logits = torch.tensor([[0.0, 300.0, 299.9]])
    for seed in range(20):
        assert sample_codes(logits, Noise(seed, [0], 0).draw(), LevelSamplingParams(temperature=temperature)) == 1


def test_samples_depend_on_seed_and_index_but_not_on_the_batch() -> None:
    prior = build(size=(6, 6), coarser=((3, 3),), classes=3)
    coarser, labels = inputs(prior, batch=7)["coarser"], inputs(prior, batch=7)["labels"]
    whole = sample_level(prior, Noise(5, range(7), 0), LevelSamplingParams(), coarser, labels)
    for part in ([0, 1, 2], [3, 4, 5, 6], [6], [4, 2]):
        alone = sample_level(
            prior, Noise(5, part, 0), LevelSamplingParams(), tuple(c[part] for c in coarser), labels[part]
        )
        assert torch.equal(alone, whole[part])
    other = sample_level(prior, Noise(6, range(7), 0), LevelSamplingParams(), coarser, labels)
    assert not torch.equal(other, whole)


@pytest.mark.parametrize(
    "params",
    [LevelSamplingParams(), LevelSamplingParams(temperature=0.7, top_k=5), LevelSamplingParams(top_p=0.8)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["pixelsnail", "pixelcnn", "transformer"])
def test_incremental_sampler_matches_naive_sampler(params: LevelSamplingParams, kind: str) -> None:
    prior = build(size=(5, 6), coarser=((5, 3),), kind=kind)
    coarser = inputs(prior, batch=3)["coarser"]
    found = sample_level(prior, Noise(0, range(3), 0), params, coarser)
    uniform = Noise(0, range(3), 0).draw(5, 6)
    codes = torch.zeros(3, 5, 6, dtype=torch.int64)
    for row in range(5):
        for column in range(6):
            with torch.no_grad():
                logits = prior(codes, coarser)[:, :, row, column]
            codes[:, row, column] = sample_codes(logits, uniform[:, row, column], params)
    assert torch.equal(found, codes)


class Replay:
    """A stand-in for a CUDA graph: three warmup calls, and `replay` calls the function again."""

    def __init__(self, work: Callable[[], None], _: torch.device) -> None:
        self.replay = work
        for _ in range(3):
            work()


@pytest.mark.parametrize("width", [1, 6])
@pytest.mark.parametrize("kind", ["pixelsnail", "pixelcnn", "transformer"])
def test_replayed_graph_gives_the_same_codes(kind: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = build(size=(5, width), classes=2, kind=kind)
    labels = torch.tensor([0, 1, 1])
    expected = sample_level(prior, Noise(0, range(3), 0), LevelSamplingParams(), (), labels)
    monkeypatch.setattr(row_sampler, "capture", Replay)
    init = row_sampler.RowSampler.__init__

    def init_with_graph(self: row_sampler.RowSampler, *arguments: Any) -> None:
        init(self, *arguments)
        self.use_graph = True

    monkeypatch.setattr(row_sampler.RowSampler, "__init__", init_with_graph)
    assert torch.equal(sample_level(prior, Noise(0, range(3), 0), LevelSamplingParams(), (), labels), expected)


def test_decoded_images_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(channels=64, residual_channels=32).build((64, 64)).eval()
    pipeline = VQVAE2Pipeline(autoencoder, ())
    codes = tuple(torch.randint(512, (20, *spec.shape)) for spec in autoencoder.map_specs)
    expected = pipeline.decode(codes)
    for size in (1, 3, 7, 16):
        parts = zip(*(level.split(size) for level in codes), strict=True)
        assert torch.equal(torch.cat([pipeline.decode(part) for part in parts]), expected)


@pytest.mark.parametrize("kind", ["pixelsnail", "pixelcnn", "transformer"])
def test_bfloat16_samples_from_nearly_the_same_distribution(kind: str) -> None:
    prior = build(size=(6, 5), coarser=((3, 5),), classes=3, kind=kind)
    given = inputs(prior, batch=40)

    def sample(dtype: str) -> torch.Tensor:
        params = LevelSamplingParams.from_dict({"dtype": dtype}, "sampling")
        return sample_level(prior, Noise(0, range(40), 0), params, given["coarser"], given["labels"])

    expected = sample("fp32")
    found = sample("bf16")
    assert 0.9 < (found == expected).double().mean() <= 1
    assert torch.equal(sample("bf16"), found)
    assert torch.equal(sample("fp32"), expected), "the prior itself is unchanged"

"""Test Toom-Cook convolutions against direct convolution: forward, backward, and row by row."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoders import incremental_logits
from tests.test_priors import build, inputs
from vqvae2.priors import toom_cook
from vqvae2.priors.layers import glu
from vqvae2.priors.toom_cook import make_transforms


@given(
    kernel=st.sampled_from([3, 5]), width=st.integers(1, 11), height=st.integers(1, 4), reach=st.integers(1, 4),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_tiled_conv2d_and_gradients_match_direct_convolution(
    kernel: int, width: int, height: int, reach: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, height + reach - 1, width + kernel - 1, generator=generator).requires_grad_()
    weight = torch.randn(4, 3, reach, kernel, generator=generator).requires_grad_()
    found = toom_cook.tiled_conv2d(x, weight)
    expected = F.conv2d(x.double(), weight.double())
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, atol=3e-5, rtol=1e-4)
    gradients = torch.autograd.grad(found, (x, weight), upstream.float())
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, (x, weight), upstream), strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_glu_and_gradient_match_torch(memory_format: torch.memory_format) -> None:
    gates = torch.randn(2, 6, 3, 4, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    upstream = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(glu(gates), F.glu(gates, 1))
    (found,), (expected,) = (torch.autograd.grad(f(gates), gates, upstream) for f in (glu, lambda x: F.glu(x, 1)))
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=memory_format)


def test_rounding_error_is_close_to_direct_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 12, 20, generator=generator)
    weight = torch.randn(32, 64, 4, 5, generator=generator) / 36
    exact = F.conv2d(x.double(), weight.double())
    direct, fast = (
        (y - exact).square().mean().sqrt() for y in (F.conv2d(x, weight), toom_cook.tiled_conv2d(x, weight))
    )
    assert fast < 6 * direct
    assert fast < 2e-6 * exact.std()


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("width", [1, 6, 9])
@pytest.mark.parametrize("min_product", [1, 10**9], ids=["tiles", "direct"])
def test_incremental_rows_match_full_convolution(
    kernel: int, width: int, min_product: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toom_cook, "_MIN_CHANNEL_PRODUCT", min_product)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 6, width, generator=generator)
    weight = torch.randn(4, 3, 2, kernel, generator=generator)
    expected = F.conv2d(F.pad(x, (kernel // 2, kernel // 2, 2, 0)), weight)
    decoder = toom_cook.IncrementalRowConv(weight, batch=2, width=width)
    for row in range(6):
        decoder.push(x[:, :, row].transpose(1, 2))
        contribution = decoder.contribution().permute(2, 1, 0)
        torch.testing.assert_close(contribution, expected[:, :, row + 1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", [3, 5])
def test_tiled_priors_are_causal_and_match_incremental_logits(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = build(size=(7, 9), kernel=kernel, layers=2)
    given = inputs(prior, batch=2)
    with torch.no_grad():
        direct = prior(**given)
    monkeypatch.setattr(toom_cook, "_MIN_CHANNEL_PRODUCT", 1)
    with torch.no_grad():
        tiled = prior(**given)
        assert not torch.equal(tiled, direct), "the tiled algorithm was used"
        torch.testing.assert_close(tiled, direct, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(incremental_logits(prior, **given), tiled, atol=1e-5, rtol=1e-4)
        for position in (0, 8, 30, 62):
            changed = given["codes"].clone()
            changed.view(2, -1)[:, position] += 1
            changed %= prior.spec.level.codebook_size
            differs = (prior(changed) - tiled).flatten(2).abs().amax((0, 1)) > 0
            assert not differs[: position + 1].any()


def test_attention_uses_the_fused_kernel() -> None:
    prior = build(size=(6, 6), heads=2).train()
    codes = inputs(prior)["codes"]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        F.cross_entropy(prior(codes), codes).backward()


def test_transforms_made_while_sampling_can_be_used_for_training() -> None:
    make_transforms.cache_clear()
    with torch.inference_mode():
        make_transforms(4, 5)
    assert not any(matrix.is_inference() for matrix in make_transforms(4, 5))

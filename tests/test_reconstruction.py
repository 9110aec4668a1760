"""Test reconstruction metrics against NumPy and scikit-image, and the conversion of floats to 8-bit levels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.inception_fixture import two_processes
from vqvae2.errors import UserError
from vqvae2.metrics import reconstruction as rec


def pair(n: int = 3, channels: int = 3, height: int = 24, width: int = 31) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(n, channels, height, width, generator=generator) * 2 - 1
    a = torch.nn.functional.avg_pool2d(a, 3, 1, 1)
    return a, a + 0.1 * torch.randn(a.shape, generator=generator)


def test_to_8bit_levels_rounds_and_clips() -> None:
    levels = torch.arange(256)
    assert torch.equal(rec.to_8bit_levels((levels / 127.5 - 1).view(1, 1, 16, 16)).flatten(), levels.float())
    assert rec.to_8bit_levels(torch.tensor([-3.0, 1.4]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_mse_psnr_and_ssim_match_scikit_image(channels: int) -> None:
    a, b = (rec.to_8bit_levels(images) for images in pair(channels=channels))
    for index, (x, y) in enumerate(zip(a.double().numpy(), b.double().numpy(), strict=True)):
        assert rec.mse(a, b)[index] == pytest.approx(((x - y) ** 2).mean(), rel=1e-6)
        assert rec.psnr(a, b)[index] == pytest.approx(peak_signal_noise_ratio(x, y, data_range=255), rel=1e-6)
        expected = structural_similarity(
            x, y, channel_axis=0, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert rec.ssim(a, b)[index] == pytest.approx(expected, abs=2e-6)


def test_data_range_scales_the_ssim_constants() -> None:
    a, b = pair()
    torch.testing.assert_close(rec.ssim(a * 127.5, b * 127.5, 255.0), rec.ssim(a, b, 2.0), rtol=0, atol=0.2)
    x, y = (image.double().numpy()[0] + 1 for image in (a, b))
    expected = structural_similarity(
        x, y, channel_axis=0, data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert rec.ssim(a + 1, b + 1, 2.0)[0] == pytest.approx(expected, abs=2e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(11, 20), st.integers(11, 20), st.integers(0, 255))
def test_equal_images_have_perfect_metrics(height: int, width: int, shade: int) -> None:
    image = torch.full((1, 1, height, width), float(shade))
    assert rec.ssim(image, image).item() == pytest.approx(1, abs=1e-6)
    assert rec.mse(image, image).item() == 0
    assert rec.psnr(image, image).item() == float("inf")


def test_streaming_means_match_means_over_images() -> None:
    a, b = pair(n=5)
    statistics = rec.ReconstructionStatistics()
    for start in (0, 2, 4):
        statistics.update(a[start : start + 2], b[start : start + 2])
    statistics.update(a[:0], b[:0])
    x, y = (np.round((image.numpy() + 1) * 127.5).clip(0, 255) for image in (a, b))
    error = ((x - y) ** 2).mean((1, 2, 3))
    result = statistics.compute()
    assert result.count == 5
    assert result.mse == pytest.approx((error / 255**2).mean(), rel=1e-6)
    assert result.psnr == pytest.approx((10 * np.log10(255**2 / error)).mean(), rel=1e-6)
    assert result.ssim == pytest.approx(rec.ssim(torch.from_numpy(x), torch.from_numpy(y)).mean().item(), rel=1e-6)


def test_metrics_of_one_batch_are_those_of_the_statistics() -> None:
    images, others = (torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(k)) * 2 - 1 for k in (0, 1))
    statistics = rec.ReconstructionStatistics()
    statistics.update(images, others)
    assert rec.compare_images(images, others) == statistics.compute()


def test_mean_psnr_is_finite_with_a_perfect_image() -> None:
    black = -torch.ones(1, 3, 16, 16)
    statistics = rec.ReconstructionStatistics()
    statistics.update(black, black)
    assert statistics.compute().psnr == pytest.approx(10 * np.log10(12 * 255**2))


def test_mismatched_and_too_small_images_raise() -> None:
    statistics = rec.ReconstructionStatistics()
    with pytest.raises(UserError, match="at least one pair"):
        statistics.compute()
    with pytest.raises(UserError, match="two equal"):
        statistics.update(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17))
    with pytest.raises(UserError, match="at least 11×11"):
        statistics.update(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))


def metrics_of_two_ranks() -> rec.ReconstructionMetrics:
    a, b = pair(n=5)
    rank = torch.distributed.get_rank()
    statistics = rec.ReconstructionStatistics()
    statistics.update(a[rank::2], b[rank::2])
    statistics.all_reduce()
    return statistics.compute()


def test_all_reduce_over_two_processes_matches_one() -> None:
    whole = rec.ReconstructionStatistics()
    whole.update(*pair(n=5))
    expected = whole.compute()
    for result in two_processes(metrics_of_two_ranks):
        assert result.count == 5
        assert (result.mse, result.psnr, result.ssim) == pytest.approx(
            (expected.mse, expected.psnr, expected.ssim), rel=1e-6
        )

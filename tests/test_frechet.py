"""Test the Fréchet distance against closed forms and SciPy, and streamed, merged, saved and invalid statistics."""

import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from tests.inception_fixture import two_processes
from vqvae2.errors import UserError
from vqvae2.metrics import frechet
from vqvae2.metrics.frechet import GaussianStatistics, frechet_distance


def rotated(rng: np.random.Generator, *spectra: np.ndarray) -> list[np.ndarray]:
    """Return commuting covariances: the given eigenvalues in one random basis."""
    basis = np.linalg.qr(rng.standard_normal((len(spectra[0]), len(spectra[0]))))[0]
    return [(basis * values) @ basis.T for values in spectra]


def closed_form(a: np.ndarray, b: np.ndarray) -> float:
    return float(((np.sqrt(a) - np.sqrt(b)) ** 2).sum())


D = 200
SPECTRA = {
    "full rank": (np.logspace(1, -6, D), np.linspace(0.1, 2, D)),
    "ill-conditioned": (np.logspace(2, -13, D), np.logspace(2, -13, D) * 1.7),
    "equal ranks": (np.r_[np.linspace(1, 2, 60), np.zeros(140)], np.r_[np.linspace(3, 1, 60), np.zeros(140)]),
    "different null spaces": (
        np.r_[np.logspace(1, -3, 90), np.zeros(110)],
        np.r_[np.zeros(30), np.logspace(0, -4, 90), np.zeros(80)],
    ),
    "orthogonal": (np.r_[np.ones(100), np.zeros(100)], np.r_[np.zeros(100), np.ones(100)]),
    "one zero covariance": (np.linspace(1, 2, D), np.zeros(D)),
    "both zero covariances": (np.zeros(D), np.zeros(D)),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_commuting_covariances_match_closed_form(name: str) -> None:
    rng = np.random.default_rng(0)
    a, b = SPECTRA[name]
    mean = rng.standard_normal(D) * 0.01
    first, second = rotated(rng, a, b)
    expected = closed_form(a, b) + mean @ mean
    assert frechet_distance(np.zeros(D), first, mean, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(mean, second, np.zeros(D), first) == pytest.approx(expected, rel=1e-6)


def test_general_covariances_match_matrix_square_root() -> None:
    rng = np.random.default_rng(1)
    first, second = (np.cov(rng.standard_normal((400, D)) @ rng.standard_normal((D, D)), rowvar=False) for _ in "ab")
    expected = np.trace(first) + np.trace(second) - 2 * np.trace(linalg.sqrtm(first @ second)).real
    assert frechet_distance(np.zeros(D), first, np.zeros(D), second) == pytest.approx(expected, rel=1e-9)


def test_fewer_samples_than_dimensions_match_singular_values() -> None:
    rng = np.random.default_rng(2)
    mixing = rng.standard_normal((D, D))
    first, second = rng.standard_normal((30, D)) @ mixing, rng.standard_normal((50, D)) @ mixing
    roots = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (first, second)]
    overlap = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    means = [x.mean(0) for x in (first, second)]
    expected = ((means[0] - means[1]) ** 2).sum() + sum((root**2).sum() for root in roots) - 2 * overlap
    covariances = [np.cov(x, rowvar=False) for x in (first, second)]
    assert frechet_distance(means[0], covariances[0], means[1], covariances[1]) == pytest.approx(expected, rel=1e-9)


def test_indefinite_float32_covariances_are_close() -> None:
    a, b = np.logspace(1, -10, D), np.linspace(0.1, 2, D)
    first, second = (sigma.astype(np.float32) for sigma in rotated(np.random.default_rng(3), a, b))
    assert np.linalg.eigvalsh(first.astype(float)).min() < 0
    assert frechet_distance(np.zeros(D), first, np.zeros(D), second) == pytest.approx(closed_form(a, b), rel=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 12), st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_distance_is_symmetric_nonnegative_and_zero_for_equal_inputs(dims: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((count, dims)), rng.standard_normal((count + 3, dims)) + 1
    a, b = (np.cov(z, rowvar=False).reshape(dims, dims) for z in (x, y))
    distance = frechet_distance(x.mean(0), a, y.mean(0), b)
    assert distance >= 0
    assert frechet_distance(y.mean(0), b, x.mean(0), a) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(x.mean(0), a, x.mean(0), a) == pytest.approx(0, abs=1e-12 * np.trace(a))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_values_and_mismatched_shapes_raise(bad: float) -> None:
    broken = np.eye(3)
    broken[1, 1] = bad
    with pytest.raises(UserError, match="NaN or infinity"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), broken)
    with pytest.raises(UserError, match=r"\(3,\) and \(4,\).*--dims"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(UserError, match="expected"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), np.eye(4))


def features(count: int = 40, dims: int = 6) -> np.ndarray:
    # The mean is 1e6 times the standard deviation: float64 sums of raw products would lose digits below 1e-4.
    return (np.random.default_rng(4).standard_normal((count, dims)) + 1e6).astype(np.float64)


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_streaming_matches_numpy_for_any_batch_size(batch: int) -> None:
    x = features()
    statistics = GaussianStatistics(6)
    for start in range(0, len(x), batch):
        statistics.update(torch.from_numpy(x[start : start + batch]))
    statistics.update(torch.empty(0, 6))
    assert statistics.count == 40
    np.testing.assert_allclose(statistics.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance, np.cov(x, rowvar=False), rtol=1e-7, atol=1e-9)


def test_merge_matches_one_pass() -> None:
    x = torch.from_numpy(features())
    whole, left, right = (GaussianStatistics(6) for _ in range(3))
    whole.update(x)
    left.update(x[:13])
    right.update(x[13:])
    left.merge(right)
    left.merge(GaussianStatistics(6))
    assert left.count == whole.count
    np.testing.assert_allclose(left.covariance, whole.covariance, rtol=1e-8, atol=1e-9)


def reduced(empty: bool) -> tuple[int | None, np.ndarray, np.ndarray]:
    x = torch.from_numpy(features())
    statistics = GaussianStatistics(6)
    rank = torch.distributed.get_rank()
    mine = x[:0] if empty and rank else x if empty else x[rank::2][: 13 + rank]
    statistics.update(mine)
    statistics.all_reduce()
    return statistics.count, statistics.mean, statistics.covariance


def test_all_reduce_over_two_processes_matches_one() -> None:
    x = features()
    for empty, all_features in ((False, np.concatenate((x[::2][:13], x[1::2][:14]))), (True, x)):
        for count, mean, covariance in two_processes(reduced, empty):
            assert count == len(all_features)
            np.testing.assert_allclose(mean, all_features.mean(0), rtol=1e-14)
            np.testing.assert_allclose(covariance, np.cov(all_features, rowvar=False), rtol=1e-7, atol=1e-9)


def test_wrong_feature_size_and_too_few_samples_raise() -> None:
    statistics = GaussianStatistics(4)
    with pytest.raises(UserError, match=r"expected features \(N, 4\), got \(2, 3\)"):
        statistics.update(torch.zeros(2, 3))
    with pytest.raises(UserError, match="got none"):
        _ = statistics.mean
    statistics.update(torch.zeros(1, 4))
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        _ = statistics.covariance


def test_file_round_trip_supports_updates_and_the_pytorch_fid_format(tmp_path: Path) -> None:
    x = torch.from_numpy(features())
    statistics = GaussianStatistics(6)
    statistics.update(x[:20])
    statistics.save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as file:
        np.testing.assert_array_equal(file["mu"], statistics.mean)
        np.testing.assert_array_equal(file["sigma"], statistics.covariance)
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]
    loaded = GaussianStatistics.load(tmp_path / "s.npz")
    assert loaded.count == 20
    loaded.update(x[20:])
    np.testing.assert_allclose(loaded.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-7, atol=1e-9)


def test_pytorch_fid_file_has_no_count_and_the_same_distance(tmp_path: Path) -> None:
    x = features()
    np.savez_compressed(tmp_path / "theirs.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    loaded = GaussianStatistics.load(tmp_path / "theirs.npz")
    assert loaded.count is None
    own = GaussianStatistics(6)
    own.update(torch.from_numpy(x))
    assert own.distance(loaded) == pytest.approx(0, abs=1e-6)
    loaded.save(tmp_path / "again.npz")
    np.testing.assert_array_equal(GaussianStatistics.load(tmp_path / "again.npz").covariance, loaded.covariance)


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = GaussianStatistics(3)
    statistics.update(torch.eye(3))
    statistics.save(tmp_path / "s.npz")
    before = (tmp_path / "s.npz").read_bytes()

    def interrupted(file, **_) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        statistics.save(tmp_path / "s.npz")
    assert (tmp_path / "s.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


INVALID = {
    "other keys": ({"mean": np.zeros(3)}, "no array `mu`"),
    "no sigma": ({"mu": np.zeros(3)}, "no array `sigma`"),
    "other shapes": ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"got \(3,\) and \(4, 4\)"),
    "scalar": ({"mu": np.float64(0), "sigma": np.eye(1)}, r"expected mu \(D,\)"),
    "integers": ({"mu": np.zeros(2, int), "sigma": np.eye(2)}, "floating-point"),
    "NaN": ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "NaN"),
    "asymmetric": ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [0, 1]])}, "not a covariance"),
    "negative variance": ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "not a covariance"),
    "count": ({"mu": np.zeros(2), "sigma": np.eye(2), "n": np.int64(1)}, "count `n`"),
    "huge count": ({"mu": np.zeros(2), "sigma": np.eye(2), "n": np.uint64(2**64 - 1)}, "count `n`"),
    "huge values": ({"mu": np.full(2, 1e300), "sigma": np.eye(2)}, "NaN, infinity or values above"),
    "pickle": ({"mu": np.array([None, {}], dtype=object), "sigma": np.eye(2)}, "not a readable"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_contents_give_one_line_error(name: str, tmp_path: Path) -> None:
    arrays, message = INVALID[name]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        GaussianStatistics.load(tmp_path / "bad.npz")
    assert str(tmp_path / "bad.npz") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 3, 100, 400])
def test_corrupted_file_gives_one_line_error(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    np.savez_compressed(path, mu=np.zeros(20), sigma=np.random.default_rng(0).standard_normal((20, 20)))
    content = path.read_bytes()
    corrupted = content[:cut] if cut < 400 else content[:cut] + bytes(40) + content[cut + 40 :]
    path.write_bytes(corrupted)
    with pytest.raises(UserError, match=r"s\.npz: not a readable \.npz") as caught:
        GaussianStatistics.load(path)
    assert "\n" not in str(caught.value)


def test_missing_files_and_single_arrays_raise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        GaussianStatistics.load(tmp_path / "none.npz")
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(UserError, match="single array"):
        GaussianStatistics.load(tmp_path / "a.npy")


def npy(shape: tuple[int, ...], dtype: str, data: bytes = b"", version: int = 1) -> bytes:
    """Return an .npy with any header."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(header)) + header + data


FALSE_HEADERS = {
    "large matrix": npy((100_000, 100_000), "<f8"),
    "large vector": npy((10**40,), "<f8", bytes(16)),
    "negative": npy((-2,), "<f8", bytes(16)),
    "large elements": npy((2,), "(100000,10000)f8", bytes(16)),
    "too long": npy((2,), "<f8", bytes(24)),
    "too short": npy((2,), "<f8", bytes(8)),
    "objects": npy((2,), "|O", bytes(16)),
    "many dimensions": npy((1,) * 100, "<f8", bytes(8)),
    "other version": npy((2,), "<f8", bytes(16), version=9),
    "no header": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f",
    "compressible": npy((2**13, 1024), "<f8", bytes(2**26)),
}


@pytest.mark.parametrize("name", FALSE_HEADERS)
def test_false_headers_are_refused_before_anything_is_allocated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "s.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("mu.npy", FALSE_HEADERS[name])
    monkeypatch.setattr(frechet, "_FREE_BYTES", 2**20)
    if name != "many dimensions":  # NumPy refuses them; the array is small
        monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(UserError, match=r"s\.npz: not a readable \.npz") as caught:
        GaussianStatistics.load(tmp_path / "s.npz")
    assert str(caught.value).isprintable()


def test_pipes_and_folders_in_place_of_statistics_raise(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match=r"pipe\.npz: not a regular file"):
        GaussianStatistics.load(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match="is a folder"):
        GaussianStatistics.load(tmp_path)

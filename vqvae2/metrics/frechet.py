"""Fréchet distance between Gaussians fitted to two sets of features (FID, Heusel et al. 2017, arXiv 1706.08500).

Features are accumulated into a float64 mean and scatter matrix, so memory does not depend on the number of images.
"""

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import scipy.linalg
import scipy.linalg.lapack
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vqvae2 import files
from vqvae2.distributed import all_reduce_sum
from vqvae2.errors import UserError
from vqvae2.metrics import float64_device

# Exceptions of zipfile and NumPy for corrupted files.
NPZ_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
# An array may be compressed to 1% of its size, or be small.
_FREE_BYTES, _MAX_RATIO = 2**30, 100
_LARGEST = 1e100  # of statistics in a file, whose products must be finite
_EPSILON = float(np.finfo(np.float64).eps)


class GaussianStatistics:
    """Streaming mean and covariance of features, in float64.

    The scatter matrix is centered at the running mean (Chan, Golub and LeVeque 1979), because sums of raw products lose
    precision if the variance is small compared to the mean. `count` is the number of features, None if the statistics
    were loaded from a file without a count.

    >>> statistics, reference = GaussianStatistics(dims=4), GaussianStatistics(dims=4)
    >>> features = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> statistics.update(features)  # once per batch
    >>> statistics.all_reduce()  # sum over ranks
    >>> reference.update(features + 1)  # shifted by 1 in each of the 4 dimensions
    >>> round(statistics.distance(reference), 4)
    4.0
    """

    def __init__(self, dims: int, device: torch.device | str = "cpu") -> None:
        self._device = float64_device(device)
        self.count: int | None = 0
        self._mean = torch.zeros(dims, dtype=torch.float64, device=self._device)
        self._scatter = torch.zeros(dims, dims, dtype=torch.float64, device=self._device)

    @property
    def dims(self) -> int:
        """Number of feature dimensions."""
        return self._mean.shape[0]

    def update(self, features: Float[Tensor, "n d"]) -> None:
        """Add a batch of features (N, D). An empty batch is ignored.

        Raises:
            UserError: If the features have the wrong shape.
        """
        assert self.count is not None, "statistics without a count cannot be updated"
        if features.ndim != 2 or features.shape[1] != self.dims:
            raise UserError(f"expected features (N, {self.dims}), got {tuple(features.shape)}")
        n = features.shape[0]
        if n == 0:
            return
        features = features.detach().to(self._device, torch.float64)
        mean = features.mean(0)
        centered = features - mean
        self._merge(n, mean, centered.T @ centered)

    def merge(self, other: "GaussianStatistics") -> None:
        """Add the features that were added to `other`."""
        assert other.count is not None, "statistics without a count cannot be merged"
        if other.count:
            self._merge(other.count, other._mean.to(self._device), other._scatter.to(self._device))

    def all_reduce(self) -> None:
        """Merge the statistics of all ranks. Call once, after the last update."""
        assert self.count is not None
        count = all_reduce_sum(torch.tensor(float(self.count), dtype=torch.float64, device=self._device))
        mean = all_reduce_sum(self._mean * self.count) / count.clamp(min=1)
        offset = self._mean - mean
        self._scatter = all_reduce_sum(self._scatter + self.count * torch.outer(offset, offset))
        self._mean, self.count = mean, int(count)

    def _merge(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        assert self.count is not None
        total = self.count + n
        offset = mean - self._mean
        self._scatter += scatter + torch.outer(offset, offset) * (self.count * n / total)
        self._mean = self._mean + offset * (n / total)
        self.count = total

    @property
    def mean(self) -> Float64[np.ndarray, "d"]:
        """Mean feature vector.

        Raises:
            UserError: If no features were added.
        """
        if self.count == 0:
            raise UserError("the mean needs at least one image, got none")
        return self._mean.cpu().numpy()

    @property
    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """Unbiased covariance (divided by N − 1, as in `np.cov`).

        Raises:
            UserError: If fewer than two features were added.
        """
        if self.count is None:
            return self._scatter.numpy()
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}")
        return self._scatter.cpu().numpy() / (self.count - 1)

    def distance(self, other: "GaussianStatistics") -> float:
        """Return the Fréchet distance to `other`.

        Raises:
            UserError: If the dimensions differ.
        """
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)

    def to_arrays(self) -> dict[str, Any]:
        """Return `mu` (D,) and `sigma` (D, D) in float64, and the count `n` if known."""
        arrays: dict[str, Any] = {"mu": self.mean, "sigma": self.covariance}
        return arrays if self.count is None else arrays | {"n": np.int64(self.count)}

    def save(self, path: Path) -> None:
        """Write an .npz that pytorch-fid can read, atomically."""
        save_npz(path, self.to_arrays())

    @classmethod
    def load(cls, path: Path) -> "GaussianStatistics":
        """Load an .npz with `mu` and `sigma` that `save` or pytorch-fid wrote.

        Raises:
            UserError: If the file is missing, corrupted or does not contain valid statistics.
        """
        return cls.from_arrays(load_npz(path, ("mu", "sigma", "n")), path)

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any], path: Path) -> "GaussianStatistics":
        """Build statistics from the arrays of an .npz. `path` is named in errors.

        Raises:
            UserError: If the arrays are not valid statistics.
        """
        if "mu" not in arrays or "sigma" not in arrays:
            missing = "mu" if "mu" not in arrays else "sigma"
            raise UserError(f"{path}: no array `{missing}`. Statistics are an .npz with `mu` (D,) and `sigma` (D, D).")
        mu, sigma = (np.asarray(arrays[key]) for key in ("mu", "sigma"))
        if mu.ndim != 1 or mu.size == 0 or sigma.shape != (mu.size, mu.size):
            raise UserError(f"{path}: expected mu (D,) and sigma (D, D), got {mu.shape} and {sigma.shape}")
        if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
            raise UserError(f"{path}: expected floating-point mu and sigma, got {mu.dtype} and {sigma.dtype}")
        mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
        if not all((np.abs(array) < _LARGEST).all() for array in (mu, sigma)):  # false for NaN too
            raise UserError(
                f"{path}: mu or sigma contains NaN, infinity or values above {_LARGEST:g}. "
                "Compute the statistics again."
            )
        # The tolerance allows for files written in float32.
        if np.abs(sigma - sigma.T).max() > 1e-5 * np.abs(sigma).max() or (sigma.diagonal() < 0).any():
            raise UserError(f"{path}: sigma is not a covariance matrix (asymmetric, or with a negative variance).")
        statistics = cls(mu.size)
        count = np.asarray(arrays["n"]) if "n" in arrays else None
        if count is not None and (count.ndim != 0 or count.dtype.kind not in "iu" or not 2 <= count < 2**53):
            raise UserError(f"{path}: the count `n` must be an integer of 2 or more, got {count}")
        statistics.count = None if count is None else int(count)
        statistics._mean = torch.from_numpy(mu)
        statistics._scatter = torch.from_numpy(sigma if count is None else sigma * (int(count) - 1))
        return statistics


def save_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Write arrays to an .npz, atomically."""
    with files.atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def load_npz(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the arrays of an .npz with the given keys, if present. Nothing is unpickled.

    Raises:
        UserError: If the file is missing, corrupted or not an .npz, or if an array holds objects or is too large.
    """
    files.require_file(path)
    with path.open("rb") as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
            raise UserError(f"{path}: expected an .npz archive, got a single array (.npy)")
    try:
        with zipfile.ZipFile(path) as archive:
            found = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            return {key: _read_array(archive, found[key], path) for key in keys if key in found}
    except UserError:
        raise
    except NPZ_ERRORS as error:
        raise UserError(f"{path}: not a readable .npz ({error}). Create it again.") from None


def read_array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an .npy: shape, whether it is in Fortran order, and dtype.

    Raises:
        ValueError: If the header is invalid.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {version[0]}.{version[1]} of the format is not supported")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("arrays of Python objects are not read")
    if any(side < 0 for side in shape):
        raise ValueError(f"invalid shape {shape}")
    return shape, fortran, dtype


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> Any:
    """Read one array, after comparing the size that its header declares with the size of the file.

    Raises:
        ValueError: If the sizes do not match.
    """
    with archive.open(entry) as file:
        shape, _, dtype = read_array_header(file)
        declared, stored = math.prod(shape) * dtype.itemsize, entry.file_size - file.tell()
    name = f"`{entry.filename.removesuffix('.npy')}` {dtype} {shape}"
    if declared != stored:
        raise ValueError(f"{name} needs {declared:,} bytes, but the file has {stored:,}")
    if declared > max(_FREE_BYTES, _MAX_RATIO * path.stat().st_size):
        raise ValueError(f"{name} needs {declared:,} bytes, too many for a file of {path.stat().st_size:,} bytes")
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def frechet_distance(
    mu1: Float[np.ndarray, "d"],
    sigma1: Float[np.ndarray, "d d"],
    mu2: Float[np.ndarray, "d"],
    sigma2: Float[np.ndarray, "d d"],
) -> float:
    """Return the squared Fréchet distance of two Gaussians, ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½).

    With Σᵢ = Lᵢ Lᵢᵀ, the trace of the last term is the nuclear norm of L₁ᵀ L₂. This needs no matrix square root and no
    complex numbers, and it is exact for rank-deficient covariances (fewer images than dimensions). Source: Dowson and
    Landau 1982.

    Raises:
        UserError: If shapes differ or a value is not finite.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(array, dtype=np.float64) for array in (mu1, mu2, sigma1, sigma2))
    if mu1.shape != mu2.shape:
        raise UserError(f"means of shapes {mu1.shape} and {mu2.shape}. Both sides need the same features (--dims).")
    if mu1.ndim != 1 or any(sigma.shape != (mu1.size, mu1.size) for sigma in (sigma1, sigma2)):
        raise UserError(
            f"expected means (D,) and covariances (D, D), got {mu1.shape}, {sigma1.shape} and {sigma2.shape}"
        )
    if not all(np.isfinite(array).all() for array in (mu1, sigma1, mu2, sigma2)):
        raise UserError("a mean or covariance contains NaN or infinity")
    overlap = _nuclear_norm(_factor(sigma1).T @ _factor(sigma2))
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap
    return max(float(distance), 0.0)  # can be slightly negative for equal Gaussians


def _factor(sigma: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d r"]:
    """Return L with L Lᵀ = Σ and rank(Σ) columns."""
    largest = sigma.diagonal().max(initial=0)
    tolerance = len(sigma) * _EPSILON * largest
    # Pivoted Cholesky stops at the rank and takes a fifth of the time of an eigendecomposition.
    packed, pivots, rank, _ = scipy.linalg.lapack.dpstrf(  # pyright: ignore[reportAttributeAccessIssue]
        sigma, tol=tolerance, lower=1
    )
    factor = np.zeros((len(sigma), rank))
    factor[pivots - 1] = np.tril(packed[:, :rank])
    if np.abs(factor @ factor.T - sigma).max(initial=0) <= 10 * tolerance:
        return factor
    # Not positive semi-definite in float64, such as a matrix stored in float32: keep the positive eigenvalues.
    values, vectors = scipy.linalg.eigh((sigma + sigma.T) / 2, check_finite=False)
    keep = values > len(sigma) * _EPSILON * np.abs(values).max(initial=0)
    return np.asarray(vectors[:, keep] * np.sqrt(values[keep]))


def _nuclear_norm(matrix: Float64[np.ndarray, "a b"]) -> float:
    """Return the sum of the singular values, from eigenvalues of the smaller Gram matrix if accurate enough."""
    if not matrix.any():
        return 0.0
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values = scipy.linalg.eigvalsh(gram, check_finite=False).clip(min=0)
    singular: np.ndarray = np.sqrt(values)
    # The error of an eigenvalue λ is ε·λmax. The error of √λ is ε·λmax / (2 √λ), and at most √(ε·λmax).
    noise = _EPSILON * values[-1]
    root = np.sqrt(noise)
    error: np.ndarray = noise / (2 * np.maximum(singular, root / 2))
    if error.sum() <= 1e-9 * singular.sum():
        return float(singular.sum())
    return float(np.sum(scipy.linalg.svdvals(matrix, check_finite=False)))  # three times slower, error ε·σmax

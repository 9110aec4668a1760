"""The Fréchet distance between Gaussians fitted to two sets of features (FID: Heusel et al. 2017, arXiv 1706.08500).

Features are streamed into a float64 mean and scatter matrix, so memory is that of the matrix whatever their number.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import scipy.linalg.lapack
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vqvae2.distributed import all_reduce_sum
from vqvae2.errors import UserError
from vqvae2.files import atomic_write

_EPSILON = float(np.finfo(np.float64).eps)


class GaussianStatistics:
    """Mean and covariance of features that arrive in batches, as one pass in float64.

    The scatter is kept about the running mean (Chan, Golub and LeVeque 1979): sums of raw products would cancel where
    features vary little about a large mean. `count` is None where statistics were read from a file that has none.

        statistics = GaussianStatistics(2048)
        for features in batches:            # (N, 2048)
            statistics.update(features)
        statistics.all_reduce()                 # on several processes
        statistics.distance(GaussianStatistics.load(Path("reference.npz")))
    """

    def __init__(self, dims: int, device: torch.device | str = "cpu") -> None:
        # MPS has no float64; sums there are made on the CPU.
        self._device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.count: int | None = 0
        self._mean = torch.zeros(dims, dtype=torch.float64, device=self._device)
        self._scatter = torch.zeros(dims, dims, dtype=torch.float64, device=self._device)

    @property
    def dims(self) -> int:
        """Length of a feature vector."""
        return self._mean.shape[0]

    def update(self, features: Float[Tensor, "n d"]) -> None:
        """Take in a batch of feature vectors; an empty batch changes nothing."""
        assert self.count is not None, "statistics of unknown count cannot grow"
        if features.ndim != 2 or features.shape[1] != self.dims:
            raise UserError(f"features of shape {tuple(features.shape)}; expected (N, {self.dims})")
        n = features.shape[0]
        if n == 0:
            return
        features = features.detach().to(self._device, torch.float64)
        mean = features.mean(0)
        centred = features - mean
        self._absorb(n, mean, centred.T @ centred)

    def merge(self, other: "GaussianStatistics") -> None:
        """Take in all that `other` has seen."""
        assert other.count is not None, "statistics of unknown count cannot be merged"
        if other.count:
            self._absorb(other.count, other._mean.to(self._device), other._scatter.to(self._device))

    def all_reduce(self) -> None:
        """Merge the statistics of all processes, on every process; nothing to do on one. Call it once, at the end."""
        assert self.count is not None
        count = all_reduce_sum(torch.tensor(float(self.count), dtype=torch.float64, device=self._device))
        mean = all_reduce_sum(self._mean * self.count) / count.clamp(min=1)
        offset = self._mean - mean
        self._scatter = all_reduce_sum(self._scatter + self.count * torch.outer(offset, offset))
        self._mean, self.count = mean, int(count)

    def _absorb(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        assert self.count is not None
        total = self.count + n
        offset = mean - self._mean
        self._scatter += scatter + torch.outer(offset, offset) * (self.count * n / total)
        self._mean = self._mean + offset * (n / total)
        self.count = total

    @property
    def mean(self) -> Float64[np.ndarray, "d"]:
        """Mean feature vector; UserError where nothing has been seen."""
        if self.count == 0:
            raise UserError("a mean needs at least one feature vector, got none")
        return self._mean.cpu().numpy()

    @property
    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """Unbiased covariance (divided by N − 1, as np.cov); UserError below two feature vectors."""
        if self.count is None:
            return self._scatter.numpy()
        if self.count < 2:
            raise UserError(f"a covariance needs at least two images, got {self.count}")
        return self._scatter.cpu().numpy() / (self.count - 1)

    def distance(self, other: "GaussianStatistics") -> float:
        """Fréchet distance to `other`; UserError where the dimensions differ."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)

    def arrays(self) -> dict[str, Any]:
        """What a file of statistics holds: `mu` (D,) and `sigma` (D, D) in float64, and the count `n` where known."""
        arrays: dict[str, Any] = {"mu": self.mean, "sigma": self.covariance}
        return arrays if self.count is None else arrays | {"n": np.int64(self.count)}

    def save(self, path: Path) -> None:
        """Write an .npz that pytorch-fid reads too, complete or not at all."""
        save_npz(path, self.arrays())

    @classmethod
    def load(cls, path: Path) -> "GaussianStatistics":
        """Read an .npz with `mu` and `sigma`, from here or from pytorch-fid; UserError where it holds anything else."""
        return cls.from_arrays(load_npz(path, ("mu", "sigma", "n")), path)

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any], path: Path) -> "GaussianStatistics":
        """Statistics from the arrays of a file; `path` names it in errors."""
        if "mu" not in arrays or "sigma" not in arrays:
            missing = "mu" if "mu" not in arrays else "sigma"
            raise UserError(f"{path}: no array `{missing}`; statistics are an .npz with `mu` (D,) and `sigma` (D, D)")
        mu, sigma = (np.asarray(arrays[key]) for key in ("mu", "sigma"))
        if mu.ndim != 1 or mu.size == 0 or sigma.shape != (mu.size, mu.size):
            raise UserError(f"{path}: mu {mu.shape} and sigma {sigma.shape}; expected (D,) and (D, D)")
        if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
            raise UserError(f"{path}: mu is {mu.dtype} and sigma {sigma.dtype}; expected floating-point numbers")
        mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError(f"{path}: mu or sigma holds NaN or infinity; make the statistics again")
        # Float32 files are symmetric to their own rounding only.
        if np.abs(sigma - sigma.T).max() > 1e-5 * np.abs(sigma).max() or (sigma.diagonal() < 0).any():
            raise UserError(f"{path}: sigma is not a covariance (asymmetric, or a negative variance)")
        statistics = cls(mu.size)
        count = np.asarray(arrays["n"]) if "n" in arrays else None
        if count is not None and (count.ndim != 0 or count.dtype.kind not in "iu" or count < 2):
            raise UserError(f"{path}: the count `n` is {count}; expected an integer of 2 or more")
        statistics.count = None if count is None else int(count)
        statistics._mean = torch.from_numpy(mu)
        statistics._scatter = torch.from_numpy(sigma if count is None else sigma * (int(count) - 1))
        return statistics


def save_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Write an .npz, complete or not at all."""
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def load_npz(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Those of `keys` that an .npz has; nothing is unpickled. UserError where the file is missing or damaged."""
    try:
        with path.open("rb") as file:  # numpy would leave a damaged file open
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(f"{path}: one bare array; expected an .npz archive")
            return {key: archive[key] for key in keys if key in archive.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a readable .npz ({error}); make it again") from None


def frechet_distance(
    mu1: Float[np.ndarray, "d"],
    sigma1: Float[np.ndarray, "d d"],
    mu2: Float[np.ndarray, "d"],
    sigma2: Float[np.ndarray, "d d"],
) -> float:
    """Squared Fréchet distance ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) between two Gaussians, at least 0.

    With Σᵢ = Lᵢ Lᵢᵀ the last trace is the nuclear norm of L₁ᵀ L₂: no square root of a matrix, no complex numbers, and
    null spaces drop out of the factors, so rank-deficient covariances (fewer images than dimensions) are exact too.
    Source: Dowson and Landau 1982. Raises UserError where the shapes do not fit or a number is not finite.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(array, dtype=np.float64) for array in (mu1, mu2, sigma1, sigma2))
    if mu1.shape != mu2.shape:
        raise UserError(f"means of shapes {mu1.shape} and {mu2.shape}: both sides need features of one kind (--dims)")
    if mu1.ndim != 1 or any(sigma.shape != (mu1.size, mu1.size) for sigma in (sigma1, sigma2)):
        raise UserError(f"means {mu1.shape}, covariances {sigma1.shape} and {sigma2.shape}; expected (D,) and (D, D)")
    if not all(np.isfinite(array).all() for array in (mu1, sigma1, mu2, sigma2)):
        raise UserError("a mean or covariance holds NaN or infinity")
    overlap = _nuclear_norm(_factor(sigma1).T @ _factor(sigma2))
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap
    return max(float(distance), 0.0)  # rounding may leave equal Gaussians a hair below


def _factor(sigma: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d r"]:
    """L with L Lᵀ = Σ and as many columns as Σ has rank."""
    largest = sigma.diagonal().max(initial=0)
    tolerance = len(sigma) * _EPSILON * largest
    # Cholesky with pivoting stops at the rank, in a fifth of the time of an eigen-decomposition.
    packed, pivots, rank, _ = scipy.linalg.lapack.dpstrf(  # pyright: ignore[reportAttributeAccessIssue]
        sigma, tol=tolerance, lower=1
    )
    factor = np.zeros((len(sigma), rank))
    factor[pivots - 1] = np.tril(packed[:, :rank])
    if np.abs(factor @ factor.T - sigma).max(initial=0) <= 10 * tolerance:
        return factor
    # Not positive semi-definite to float64, as after storage in float32: only eigenvalues can tell noise from variance.
    values, vectors = scipy.linalg.eigh((sigma + sigma.T) / 2, check_finite=False)
    keep = values > len(sigma) * _EPSILON * np.abs(values).max(initial=0)
    return np.asarray(vectors[:, keep] * np.sqrt(values[keep]))


def _nuclear_norm(matrix: Float64[np.ndarray, "a b"]) -> float:
    """Sum of the singular values, from the eigenvalues of the smaller Gram matrix where squaring costs no digits."""
    if not matrix.any():
        return 0.0
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values = scipy.linalg.eigvalsh(gram, check_finite=False).clip(min=0)
    singular: np.ndarray = np.sqrt(values)
    # An eigenvalue is known to ε·λmax, so its root to √(ε·λmax) at worst and to half of ε·λmax over the root at best.
    noise = _EPSILON * values[-1]
    root = np.sqrt(noise)
    error: np.ndarray = noise / (2 * np.maximum(singular, root / 2))
    if error.sum() <= 1e-9 * singular.sum():
        return float(singular.sum())
    return float(np.sum(scipy.linalg.svdvals(matrix, check_finite=False)))  # three times slower, exact to ε·σmax

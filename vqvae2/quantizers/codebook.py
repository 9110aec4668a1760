"""What codebooks share, however they learn: lookup, k-means initialisation, statistics over processes, restarts."""

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from vqvae2.config import Config
from vqvae2.distributed import all_reduce_sum, get_rank, get_world_size, is_distributed
from vqvae2.quantizers.base import Quantizer, QuantizerOutput, rotation_trick, straight_through
from vqvae2.quantizers.nearest import cluster_sums, kmeans, nearest

_KMEANS_ITERATIONS = 10
_KMEANS_ROWS_PER_CODE = 64


class CodebookConfig(Config):
    """Settings of a codebook; `codes` × `dim` is 512 × 64 in the VQ-VAE-2 paper."""

    codebook_size: int = Field(default=512, ge=1, description="number of codes")
    code_dim: int = Field(default=64, ge=1, description="width of the features that are quantized")
    commitment_weight: float = Field(default=0.25, ge=0, description="β, the weight of the commitment term")
    ema_decay: float = Field(
        default=0.99, ge=0, lt=1, description="γ, of the moving averages of use (and of an EMA codebook)"
    )
    kmeans_init: bool = Field(default=True, description="start from k-means centres of the first batch")
    dead_code_threshold: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="restart a code that is used less than this share of the average; 0 never does",
    )
    cosine: bool = Field(default=False, description="compare directions: features and codes are scaled to length one")
    codebook_dim: int | None = Field(default=None, ge=1, description="look codes up in a space of this many dimensions")
    gradient_estimator: Literal["straight-through", "rotation"] = Field(
        default="straight-through", description="how gradients pass the quantizer"
    )


class CodebookQuantizer(Quantizer):
    """A quantizer that looks up the nearest of `codes` learned vectors.

    Statistics gather in `forward` (training mode only) and take effect in `update`, summed over all processes, so that
    a codebook is the same on one process with batch 2N, on two with batch N, or over two accumulated batches of N.
    """

    ema_cluster_size: Tensor  # (K,) moving average of how often each code is used in a step, all processes together
    initialized: Tensor  # () bool: the vectors are in place
    updates: Tensor  # () int64: how many updates there have been; seeds the draws that every process must agree on

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size, self.code_dim = config.codebook_size, config.code_dim
        width = config.codebook_dim or config.code_dim
        self.project_in = nn.Linear(config.code_dim, width) if config.codebook_dim else nn.Identity()
        self.project_out = nn.Linear(width, config.code_dim) if config.codebook_dim else nn.Identity()
        self.register_buffer("ema_cluster_size", torch.ones(config.codebook_size))
        self.register_buffer("initialized", torch.tensor(not config.kmeans_init))
        self.register_buffer("updates", torch.tensor(0))
        self._ready = not config.kmeans_init
        self._counts: Tensor | None = None  # statistics of the forward passes since the last update
        self._sums: Tensor | None = None
        self._rows: Tensor | None = None  # the latest rows, from which codes are restarted

    @property
    @abstractmethod
    def vectors(self) -> Float[Tensor, "k width"]:
        """The codebook as it is compared with features."""

    @abstractmethod
    def _set_vectors(self, vectors: Tensor, usage: Tensor, where: Tensor) -> None:
        """Put `vectors` in place with the uses they stand for, at the codes where `where` (K,) is true."""

    @abstractmethod
    def _codebook_loss(self, rows: Tensor, quantized: Tensor) -> Tensor | None:
        """The loss that teaches the codebook, if a loss does."""

    def _learn(self, counts: Tensor, sums: Tensor) -> None:
        """Learn from the uses (K,) of each code and the sums (K, width) of the features that chose it."""

    def forward(self, features: Float[Tensor, "b d *spatial"]) -> QuantizerOutput:
        self._check_width(features)
        with torch.autocast(features.device.type, enabled=False):
            latents = self.project_in(features.float().movedim(1, -1))
            if self.config.cosine:
                latents = F.normalize(latents, dim=-1)
            rows = latents.reshape(-1, latents.shape[-1])
            if self.training and len(rows):
                self._ensure_initialized(rows.detach())
            codes = nearest(rows.detach(), self.vectors)
            quantized = F.embedding(codes, self.vectors)
            commitment = mean_square(rows - quantized.detach())
            codebook = self._codebook_loss(rows.detach(), quantized)
            loss = self.config.commitment_weight * commitment + (0.0 if codebook is None else codebook)
            terms = {"commitment": commitment.detach()} | ({} if codebook is None else {"codebook": codebook.detach()})
            if self.training:
                self._record(rows.detach(), codes)
            values = quantized.detach()
            if rows.requires_grad:  # otherwise exactly the codebook's vectors, as `lookup` gives them
                values = (rotation_trick if self.config.gradient_estimator == "rotation" else straight_through)(
                    rows, values
                )
            values = self.project_out(values.reshape(latents.shape))
            return QuantizerOutput(values.movedim(-1, 1), codes.reshape(latents.shape[:-1]), loss, terms)

    def lookup(self, codes: Int[Tensor, "b *spatial"]) -> Float[Tensor, "b d *spatial"]:
        with torch.autocast(codes.device.type, enabled=False):
            return self.project_out(F.embedding(codes, self.vectors)).movedim(-1, 1)

    @torch.no_grad()
    def update(self) -> None:
        if self._counts is None or self._sums is None or self._rows is None:
            return
        counts, sums, rows = all_reduce_sum(self._counts), all_reduce_sum(self._sums), self._rows
        self._counts = self._sums = self._rows = None
        self.ema_cluster_size.lerp_(counts, 1 - self.config.ema_decay)
        self._learn(counts, sums)
        if self.config.dead_code_threshold > 0:
            # A new code is given twice the use it is judged by, so that it has time to find features: 69 steps at γ =
            # 0.99.
            fresh = _rows_of_all_processes(rows, self.codebook_size, self._generator())
            threshold = self.config.dead_code_threshold * counts.sum() / self.codebook_size
            dead = self.ema_cluster_size < threshold
            grace = (2 * threshold).expand(self.codebook_size)
            self.ema_cluster_size.copy_(torch.where(dead, grace, self.ema_cluster_size))
            self._set_vectors(fresh, grace, dead)
        self.updates += 1

    def _record(self, rows: Tensor, codes: Tensor) -> None:
        counts, sums = cluster_sums(rows, codes, self.codebook_size)
        self._counts = counts if self._counts is None else self._counts + counts
        self._sums = sums if self._sums is None else self._sums + sums
        self._rows = rows

    @torch.no_grad()
    def _ensure_initialized(self, rows: Tensor) -> None:
        """Start from k-means centres of the first batch, the same on every process."""
        if self._ready or self.initialized.item():
            self._ready = True  # asked of the tensor once only: on a GPU the question waits for the device
            return
        generator = self._generator()
        sample = _rows_of_all_processes(rows, self.codebook_size * _KMEANS_ROWS_PER_CODE, generator)
        centres, counts = kmeans(sample, self.codebook_size, _KMEANS_ITERATIONS, generator)
        if is_distributed():  # sums on a GPU are not the same to the last bit on every process
            for tensor in (centres, counts):
                torch.distributed.broadcast(tensor, src=0)
        total = all_reduce_sum(torch.tensor(float(len(rows)), device=rows.device))
        usage = (counts * total / counts.sum()).clamp_min(
            2 * self.config.dead_code_threshold * total / self.codebook_size
        )
        self.ema_cluster_size.copy_(usage)
        self._set_vectors(centres, usage, torch.ones_like(self.ema_cluster_size, dtype=torch.bool))
        self.initialized.fill_(True)
        self._ready = True

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(int(self.updates))


def mean_square(difference: Tensor) -> Tensor:
    """Mean of squares; zero, not NaN, for an empty batch."""
    return difference.square().sum() / max(difference.numel(), 1)


def _rows_of_all_processes(
    rows: Float[Tensor, "n d"], count: int, generator: torch.Generator
) -> Float[Tensor, "count d"]:
    """`count` random rows (with replacement) of the batches of all processes, in rank order: the same on each of them.

    Every process draws the same numbers and fills in the rows that are its own; the sum has them all. Zeros where no
    process has any.
    """
    sizes = torch.zeros(get_world_size(), dtype=torch.int64, device=rows.device)
    sizes[get_rank()] = len(rows)
    ends = all_reduce_sum(sizes).cumsum(0).tolist()
    drawn = torch.randint(max(ends[-1], 1), (count,), generator=generator).to(rows.device) - (
        ends[get_rank()] - len(rows)
    )
    mine = (drawn >= 0) & (drawn < len(rows))
    own = rows[drawn.clamp(0, len(rows) - 1)] if len(rows) else rows.new_zeros(count, rows.shape[1])
    return all_reduce_sum(torch.where(mine[:, None], own, 0.0))

"""Base class of quantizers with a learned codebook: lookup, k-means initialization, statistics, dead-code restarts."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from vqvae2.config import Config
from vqvae2.distributed import all_reduce_sum, get_rank, get_world_size, is_distributed
from vqvae2.quantizers.base import MAX_CODES, Quantizer, QuantizerOutput
from vqvae2.quantizers.gradient_estimators import rotation_trick, straight_through
from vqvae2.quantizers.nearest import cluster_sums, kmeans, nearest_codes

_KMEANS_ITERATIONS = 10
_KMEANS_SAMPLES_PER_CODE = 64
_KMEANS_MAX_SAMPLES = 2**17  # the time of k-means is proportional to samples × codes


class CodebookConfig(Config):
    """Settings of a codebook. The VQ-VAE-2 paper uses 512 codes of 64 dimensions."""

    codebook_size: int = Field(default=512, ge=1, le=MAX_CODES, description="number of codes")
    code_dim: int = Field(default=64, ge=1, le=2**14, description="channels of the features to quantize")
    commitment_weight: float = Field(default=0.25, ge=0, description="β, the weight of the commitment loss")
    ema_decay: float = Field(
        default=0.99, ge=0, lt=1, description="γ, decay of the moving averages of code usage (and of an EMA codebook)"
    )
    kmeans_init: bool = Field(default=True, description="initialize the codebook with k-means on the first batch")
    dead_code_threshold: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="restart codes whose usage falls below this fraction of the mean usage; 0 disables restarts",
    )
    cosine: bool = Field(default=False, description="use cosine similarity: features and codes are L2-normalized")
    codebook_dim: int | None = Field(
        default=None, ge=1, description="project features to this many dimensions for the lookup"
    )
    gradient_estimator: Literal["straight-through", "rotation"] = Field(
        default="straight-through", description="gradient of the quantization step"
    )


class CodebookQuantizer(Quantizer):
    """Base class of quantizers that look up the nearest of `codebook_size` learned vectors.

    In training mode, `forward` accumulates statistics and `update` applies them, summed over all ranks. The codebook is
    therefore the same with one process and batch size 2N, or two processes and batch size N. With two accumulated
    batches of size N it is, too, except that k-means uses the first one and restarts use the last one.
    """

    ema_cluster_size: Tensor  # (K,) moving average of the uses of each code per step, summed over ranks
    initialized: Tensor  # () bool, whether the codebook has been initialized
    updates: Tensor  # () int64, number of updates so far; seeds the random draws, which must agree on all ranks

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
        # The same on the host, because reading a buffer waits for the device.
        self._is_initialized, self._num_updates = not config.kmeans_init, 0
        # Statistics of the forward passes since the last update.
        self._counts: Tensor | None = None
        self._sums: Tensor | None = None
        self._latents: Tensor | None = None  # of the last forward pass; dead codes restart from them

    @property
    @abstractmethod
    def codebook(self) -> Float[Tensor, "k width"]:
        """The code vectors, normalized if `cosine` is set."""

    @abstractmethod
    def _replace_codes(
        self, vectors: Float[Tensor, "k width"], cluster_size: Float[Tensor, " k"], mask: Bool[Tensor, " k"]
    ) -> None:
        """Replace the masked codes by `vectors`, with `cluster_size` as their initial usage."""

    @abstractmethod
    def _codebook_loss(self, latents: Tensor, quantized: Tensor) -> Tensor | None:
        """Return the loss that trains the codebook, or None if it is not trained by a loss."""

    def _update_codebook(self, counts: Float[Tensor, " k"], sums: Float[Tensor, "k width"]) -> None:
        """Update the codebook from each code's number of assigned latents and their sum."""

    def forward(self, features: Float[Tensor, "b d *spatial"]) -> QuantizerOutput:
        self._check_features(features)
        with torch.autocast(features.device.type, enabled=False):
            projected = self.project_in(features.float().movedim(1, -1))
            if self.config.cosine:
                projected = F.normalize(projected, dim=-1)
            latents = projected.reshape(-1, projected.shape[-1])
            if self.training and not self._is_initialized and len(latents):
                self._initialize(latents.detach())
            codes = nearest_codes(latents.detach(), self.codebook)
            quantized = F.embedding(codes, self.codebook)
            commitment_loss = mean_square(latents - quantized.detach())
            codebook_loss = self._codebook_loss(latents.detach(), quantized)
            loss = self.config.commitment_weight * commitment_loss + (0.0 if codebook_loss is None else codebook_loss)
            loss_terms = {"commitment": commitment_loss.detach()}
            if codebook_loss is not None:
                loss_terms["codebook"] = codebook_loss.detach()
            if self.training:
                self._accumulate_statistics(latents.detach(), codes)
            quantized = quantized.detach()
            if latents.requires_grad:  # without gradients, return exactly what `lookup` returns
                estimator = rotation_trick if self.config.gradient_estimator == "rotation" else straight_through
                quantized = estimator(latents, quantized)
            quantized = self.project_out(quantized.reshape(projected.shape)).movedim(-1, 1)
            return QuantizerOutput(quantized, codes.reshape(projected.shape[:-1]), loss, loss_terms)

    def lookup(self, codes: Int[Tensor, "b *spatial"]) -> Float[Tensor, "b d *spatial"]:
        with torch.autocast(codes.device.type, enabled=False):
            return self.project_out(F.embedding(codes, self.codebook)).movedim(-1, 1)

    @torch.no_grad()
    def update(self) -> None:
        if self._counts is None or self._sums is None or self._latents is None:
            return
        counts, sums, latents = all_reduce_sum(self._counts), all_reduce_sum(self._sums), self._latents
        self._counts = self._sums = self._latents = None
        self.ema_cluster_size.lerp_(counts, 1 - self.config.ema_decay)
        self._update_codebook(counts, sums)
        if self.config.dead_code_threshold > 0:
            self._restart_dead_codes(counts, latents)
        self._num_updates += 1
        self.updates += 1

    def _restart_dead_codes(self, counts: Float[Tensor, " k"], latents: Float[Tensor, "n width"]) -> None:
        """Replace codes with too little usage by random latents of the current batch."""
        vectors = _sample_latents(latents, self.codebook_size, self._generator())
        # Relative to the moving averages, not to this batch, which may be larger than those before: that of a
        # pretrained codebook, or one micro-batch, for k-means.
        threshold = self.config.dead_code_threshold * self.ema_cluster_size.sum() / self.codebook_size
        dead = (self.ema_cluster_size < threshold) & (counts.sum() > 0)  # nothing replaces them without latents
        # Twice the threshold gives a new code time to be used before it can be restarted: 69 steps at γ = 0.99.
        cluster_size = (2 * threshold).expand(self.codebook_size)
        self.ema_cluster_size.copy_(torch.where(dead, cluster_size, self.ema_cluster_size))
        self._replace_codes(vectors, cluster_size, dead)

    def _accumulate_statistics(self, latents: Tensor, codes: Tensor) -> None:
        counts, sums = cluster_sums(latents, codes, self.codebook_size)
        self._counts = counts if self._counts is None else self._counts + counts
        self._sums = sums if self._sums is None else self._sums + sums
        self._latents = latents

    @torch.no_grad()
    def _initialize(self, latents: Tensor) -> None:
        """Initialize the codebook with k-means centers of the first batch, identical on all ranks."""
        generator = self._generator()
        samples = min(self.codebook_size * _KMEANS_SAMPLES_PER_CODE, max(_KMEANS_MAX_SAMPLES, self.codebook_size))
        ends = _batch_ends(latents)
        total = int(ends[-1])  # the host waits for the device, once
        if total <= samples:
            sample = _latents_at(latents, torch.arange(total, device=latents.device), ends)
        else:
            sample = _sample_latents(latents, samples, generator)
        centers, counts = kmeans(sample, self.codebook_size, _KMEANS_ITERATIONS, generator)
        if is_distributed():  # sums on a GPU are not bitwise identical on all ranks
            for tensor in (centers, counts):
                torch.distributed.broadcast(tensor, src=0)
        cluster_size = (counts * total / counts.sum()).clamp_min(
            2 * self.config.dead_code_threshold * total / self.codebook_size
        )
        self.ema_cluster_size.copy_(cluster_size)
        self._replace_codes(centers, cluster_size, torch.ones_like(self.ema_cluster_size, dtype=torch.bool))
        self.initialized.fill_(True)
        self._is_initialized = True

    def _generator(self) -> torch.Generator:
        """Return a random generator in the same state on all ranks."""
        return torch.Generator().manual_seed(self._num_updates)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, *args, **kwargs)
        self._is_initialized, self._num_updates = bool(self.initialized), int(self.updates)


def mean_square(difference: Tensor) -> Tensor:
    """Return the mean of squares, 0 for an empty batch."""
    return difference.square().sum() / max(difference.numel(), 1)


def _sample_latents(latents: Float[Tensor, "n d"], count: int, generator: torch.Generator) -> Float[Tensor, "count d"]:
    """Sample `count` latents with replacement from the batches of all ranks. The result is the same on every rank.

    All ranks draw the same positions in the concatenated batches. Returns zeros if the batches of all ranks are empty.
    """
    ends = _batch_ends(latents)
    drawn = torch.randint(2**62, (count,), generator=generator, pin_memory=latents.device.type == "cuda")
    return _latents_at(latents, drawn.to(latents.device, non_blocking=True) % ends[-1].clamp_min(1), ends)


def _batch_ends(latents: Float[Tensor, "n d"]) -> Int[Tensor, " ranks"]:
    """Return where the batch of each rank ends in the concatenated batches, on the device."""
    sizes = torch.zeros(get_world_size(), dtype=torch.int64, device=latents.device)
    sizes[get_rank()] = len(latents)
    return all_reduce_sum(sizes).cumsum(0)


def _latents_at(
    latents: Float[Tensor, "n d"], positions: Int[Tensor, " m"], ends: Int[Tensor, " ranks"]
) -> Float[Tensor, "m d"]:
    """Return the latents at positions in the concatenated batches of all ranks.

    Each rank fills in its own latents, and an all-reduce combines them.
    """
    positions = positions - (ends[get_rank()] - len(latents))  # relative to this rank's batch
    is_local = (positions >= 0) & (positions < len(latents))
    empty = latents.new_zeros(len(positions), latents.shape[1])
    local = latents[positions.clamp(0, len(latents) - 1)] if len(latents) else empty
    return all_reduce_sum(torch.where(is_local[:, None], local, 0.0))

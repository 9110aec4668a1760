"""Sampling one level's codes: the walk over positions, temperature, top-k, top-p, and each image's own noise."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from sampling.row_sampler import RowSampler
from vqvae2.code_maps import CodeMaps
from vqvae2.config import Config
from vqvae2.priors import IncrementalDecoder, Prior
from vqvae2.priors.base import Column


class LevelSamplingParams(Config):
    """How a code is chosen from its logits; the defaults sample from the model as it is."""

    temperature: float = Field(default=1.0, ge=0, description="0 always takes the likeliest code")
    top_k: int = Field(default=0, ge=0, description="choose among the k likeliest codes; 0 for all")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="choose among the likeliest codes that make up this probability"
    )

    def __call__(self, logits: Float[Tensor, "b k"], noise: Float[Tensor, "b k"]) -> Int[Tensor, " b"]:
        """Codes drawn by the Gumbel-max trick; `noise` holds standard exponential variates."""
        if self.temperature == 0:
            return logits.argmax(1)
        logits = keep_top_p(keep_top_k(logits.float() / self.temperature, self.top_k), self.top_p)
        return (logits - noise.log()).argmax(1)  # −log of an exponential variate is a Gumbel variate


def keep_top_k(logits: Float[Tensor, "b k"], count: int) -> Float[Tensor, "b k"]:
    """Logits with all but the `count` largest of each row at −∞."""
    if count == 0 or count >= logits.shape[1]:
        return logits
    bound = logits.topk(count, dim=1).values[:, -1:]
    return logits.masked_fill(logits < bound, -torch.inf)


def keep_top_p(logits: Float[Tensor, "b k"], share: float) -> Float[Tensor, "b k"]:
    """Logits with all at −∞ but the fewest largest of each row whose probabilities sum to at least `share`."""
    if share >= 1:
        return logits
    ordered, order = logits.sort(1, descending=True)
    probabilities = ordered.softmax(1)
    before = probabilities.cumsum(1) - probabilities
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= share), -torch.inf)


class Noise:
    """Exponential variates for each image from its own stream, a function of (seed, image, level) alone.

    An image is a number, or a pair of an image's number and a variant's. They are drawn on the CPU, so that a GPU
    samples the same images.
    """

    def __init__(self, seed: int, images: Sequence[int | tuple[int, int]], level: int) -> None:
        keys = [image if isinstance(image, tuple) else (image,) for image in images]
        self.generators = [
            torch.Generator().manual_seed(
                int(np.random.SeedSequence((seed, *key, level)).generate_state(1, np.uint64)[0] >> 1)
            )
            for key in keys
        ]

    def row(self, width: int, codes: int) -> Float[Tensor, "w b k"]:
        """The variates of the next row of positions."""
        rows = [torch.empty(width, codes).exponential_(generator=generator) for generator in self.generators]
        return torch.stack(rows, 1)


class PartialCodes(NamedTuple):
    """Codes of which some are kept and the others sampled."""

    codes: Int[Tensor, "b h w"]
    keep: Bool[Tensor, "b h w"]


class ClassifierFreeGuidance(IncrementalDecoder):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): one walk over a batch of twice the size.

    Its logits are u + scale · (c − u), c with the labels and u without: 0 ignores the labels, 1 follows the model,
    more exaggerates what the label changes.
    """

    def __init__(self, prior: Prior, coarser: CodeMaps, labels: Int[Tensor, " b"], scale: float) -> None:
        without = torch.full_like(labels, prior.spec.num_classes)
        doubled = tuple(codes.repeat(2, 1, 1) for codes in coarser)
        self.steps = prior.incremental_decoder(2 * len(labels), doubled, torch.cat([labels, without]))
        self.scale = scale

    def begin_row(self, row: int) -> None:
        self.steps.begin_row(row)

    def logits(self, column: Column) -> Float[Tensor, "b k"]:
        conditional, unconditional = self.steps.logits(column).float().chunk(2)
        return unconditional + self.scale * (conditional - unconditional)

    def set_codes(self, column: Column, codes: Int[Tensor, " b"]) -> None:
        self.steps.set_codes(column, codes.repeat(2))


@torch.inference_mode()
def sample_level(
    prior: Prior,
    noise: Noise,
    choice: LevelSamplingParams,
    coarser: CodeMaps = (),
    labels: Int[Tensor, " b"] | None = None,
    progress: Callable[[int], object] = lambda positions: None,
    guidance_scale: float = 1.0,
    known: PartialCodes | None = None,
) -> Int[Tensor, "b h w"]:
    """Sample the code maps of one level for a batch of images, computing each position once.

    `coarser` are the maps that condition it, finest first; `progress` is called with the positions done. Where `known`
    says so, its codes stand instead of sampled ones. `guidance_scale` other than 1 needs labels.
    """
    height, width = prior.spec.level.shape
    batch = len(noise.generators)
    device = next(prior.parameters()).device
    codes = torch.zeros(batch, height, width, dtype=torch.int64, device=device)
    rows = height  # to walk: what follows the last sampled code need not be
    if known is not None:
        codes.copy_(known.codes)
        sampled = (~known.keep).any(2).any(0).nonzero()
        rows = int(sampled.max()) + 1 if len(sampled) else 0
    if rows == 0:
        progress(codes.numel())
        return codes
    positions = RowSampler(
        _decoder(prior, batch, coarser, labels, guidance_scale), choice, batch, prior.spec.level, device
    )
    for row in range(rows):
        keep = None if known is None else known.keep[:, row]
        codes[:, row] = positions.incremental(
            row, noise.row(width, prior.spec.level.codebook_size), codes[:, row], keep
        )
        progress(batch * width)
    if rows < height:
        progress(batch * width * (height - rows))
    return codes


def _decoder(
    prior: Prior, batch: int, coarser: CodeMaps, labels: Int[Tensor, " b"] | None, guidance_scale: float
) -> IncrementalDecoder:
    if guidance_scale == 1:
        return prior.incremental_decoder(batch, coarser, labels)
    if labels is None:
        raise ValueError(f"guidance_scale {guidance_scale:g} needs labels to be guided by")
    return ClassifierFreeGuidance(prior, coarser, labels, guidance_scale)

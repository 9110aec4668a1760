"""Sampling one level's codes: the walk over positions, temperature, top-k, top-p, and each image's own noise."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from vqvae2.config import Config
from vqvae2.maps import CodeMaps
from vqvae2.priors import Prior


class Choice(Config):
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

    They are drawn on the CPU, so that a GPU samples the same images.
    """

    def __init__(self, seed: int, images: Sequence[int], level: int) -> None:
        self.generators = [
            torch.Generator().manual_seed(
                int(np.random.SeedSequence((seed, image, level)).generate_state(1, np.uint64)[0] >> 1)
            )
            for image in images
        ]

    def row(self, width: int, codes: int) -> Float[Tensor, "w b k"]:
        """The variates of the next row of positions."""
        rows = [torch.empty(width, codes).exponential_(generator=generator) for generator in self.generators]
        return torch.stack(rows, 1)


@torch.inference_mode()
def sample_level(
    prior: Prior,
    noise: Noise,
    choice: Choice,
    coarser: CodeMaps = (),
    labels: Int[Tensor, " b"] | None = None,
    progress: Callable[[int], object] = lambda positions: None,
) -> Int[Tensor, "b h w"]:
    """Sample the code maps of one level for a batch of images, computing each position once.

    `coarser` are the maps that condition it, finest first; `progress` is called with the positions done.
    """
    height, width = prior.spec.level.shape
    batch = len(noise.generators)
    device = next(prior.parameters()).device
    codes = torch.zeros(batch, height, width, dtype=torch.int64, device=device)
    steps = prior.incremental(batch, coarser, labels)
    for row in range(height):
        steps.begin_row(row)
        variates = noise.row(width, prior.spec.level.codes).to(device, non_blocking=True)
        for column in range(width):
            chosen = choice(steps.logits(column), variates[column])
            steps.feed(column, chosen)
            codes[:, row, column] = chosen
        progress(batch * width)
    return codes

"""Sample a batch of code maps in wavefront order, one position of each of many rows in one step."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sampling.logits import sample_codes
from sampling.params import LevelSamplingParams
from vqvae2.priors.base import WavefrontDecoder


def sample_wavefront(
    decoder: WavefrontDecoder,
    params: LevelSamplingParams,
    next_noise: Callable[[], Float[Tensor, "w b k"]],
    codes: Int[Tensor, "b h w"],
    keep: Bool[Tensor, "b h w"] | None = None,
    progress: Callable[[int], object] = lambda positions: None,
) -> None:
    """Replace `codes` by sampled ones, except if `keep` is true.

    Args:
        next_noise: Draws the exponential variates of the next row.
        progress: Called with the number of positions completed since the last call.
    """
    noise: dict[int, Tensor] = {}  # of the rows in flight
    for wave in decoder.shape.waves():
        noise.pop(wave.first - 1, None)
        if wave.end - 1 not in noise:
            noise[wave.end - 1] = next_noise().to(codes.device)
        rows, columns = decoder.shape.raster_positions(wave, codes.device)
        variates = [noise[row][column] for row, column in zip(rows.tolist(), columns.tolist(), strict=True)]
        logits = decoder.logits(wave)
        sampled = sample_codes(logits.flatten(0, 1), torch.cat(variates), params).view(logits.shape[:2])
        if keep is not None:
            sampled = torch.where(keep[:, rows, columns].T, codes[:, rows, columns].T, sampled)
        decoder.set_codes(wave, sampled)
        codes[:, rows, columns] = sampled.T
        progress(sampled.numel())

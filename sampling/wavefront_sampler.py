"""Sample a batch of code maps in wavefront order, one position of each of many rows in one step."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sampling.logits import sample_codes
from sampling.params import CodeSamplingParams
from vqvae2.priors.base import WavefrontDecoder


def sample_wavefront(
    decoder: WavefrontDecoder,
    params: CodeSamplingParams,
    uniform: Float[Tensor, "b h w"],
    codes: Int[Tensor, "b h w"],
    keep: Bool[Tensor, "b h w"] | None = None,
    progress: Callable[[int], object] = lambda positions: None,
) -> None:
    """Replace `codes` by sampled ones, except if `keep` is true.

    Args:
        uniform: Variates in [0, 1).
        progress: Called with the number of positions completed since the last call.
    """
    for wave in decoder.shape.waves():
        rows, columns = decoder.shape.index_tensors(wave, codes.device)
        logits = decoder.logits(wave)
        sampled = sample_codes(logits.flatten(0, 1), uniform[:, rows, columns].T.flatten(), params).view(
            logits.shape[:2]
        )
        if keep is not None:
            sampled = torch.where(keep[:, rows, columns].T, codes[:, rows, columns].T, sampled)
        decoder.set_codes(wave, sampled)
        codes[:, rows, columns] = sampled.T
        progress(sampled.numel())

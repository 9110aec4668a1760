"""From logits to codes: temperature, top-k and top-p."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sampling.params import CodeSamplingParams

# Logits divided by less can overflow to infinity, and their softmax is NaN. At 1e-30 it is already one-hot.
_MIN_TEMPERATURE = 1e-30


def sample_codes(
    logits: Float[Tensor, "b k"], uniform: Float[Tensor, " b"], params: CodeSamplingParams
) -> Int[Tensor, " b"]:
    """Sample codes by inversion of the cumulative distribution. `uniform` holds variates in [0, 1).

    A temperature below 1e-30 selects the most likely code, as 0 does.

    >>> probabilities = torch.tensor([0.2, 0.5, 0.3])
    >>> sample_codes(probabilities.log().expand(3, 3), torch.tensor([0.9, 0.5, 0.1]), CodeSamplingParams()).tolist()
    [0, 1, 2]
    """
    if params.temperature < _MIN_TEMPERATURE:
        return logits.argmax(1)
    logits = keep_top_p(keep_top_k(logits.float() / params.temperature, params.top_k), params.top_p)
    cumulative = logits.softmax(1).cumsum(1, dtype=torch.float64)  # in float32, the order of additions would matter
    # The bound is positive and at most the total, so a code of probability 0 is never sampled.
    bound = (1 - uniform.double()) * cumulative[:, -1]
    return (cumulative < bound[:, None]).sum(1)


def keep_top_k(logits: Float[Tensor, "b k"], count: int) -> Float[Tensor, "b k"]:
    """Set all but the `count` largest logits of each row to −∞, also if others are equal to them; 0 keeps all."""
    if count == 0 or count >= logits.shape[1]:
        return logits
    largest, codes = logits.topk(count, dim=1)
    return torch.full_like(logits, -torch.inf).scatter(1, codes, largest)


def keep_top_p(logits: Float[Tensor, "b k"], probability: float) -> Float[Tensor, "b k"]:
    """Keep the fewest largest logits of each row with a total probability of `probability`; set the others to −∞."""
    if probability >= 1:
        return logits
    ordered, order = logits.sort(1, descending=True)
    probabilities = ordered.softmax(1)
    before = probabilities.cumsum(1) - probabilities
    removed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= probability)
    return logits.masked_fill(removed, -torch.inf)

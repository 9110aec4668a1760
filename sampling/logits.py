"""From logits to codes: temperature, top-k and top-p."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sampling.params import LevelSamplingParams


def sample_codes(
    logits: Float[Tensor, "b k"], noise: Float[Tensor, "b k"], params: LevelSamplingParams
) -> Int[Tensor, " b"]:
    """Sample codes by the Gumbel-max trick. `noise` holds standard exponential variates.

    >>> logits = torch.tensor([[0.0, 3.0, 1.0]])
    >>> sample_codes(logits, torch.ones(1, 3), LevelSamplingParams(temperature=0)).tolist()
    [1]
    """
    if params.temperature == 0:
        return logits.argmax(1)
    logits = keep_top_p(keep_top_k(logits.float() / params.temperature, params.top_k), params.top_p)
    return (logits - noise.log()).argmax(1)  # −log of an exponential variate is a Gumbel variate


def keep_top_k(logits: Float[Tensor, "b k"], count: int) -> Float[Tensor, "b k"]:
    """Set all but the `count` largest logits of each row to −∞; 0 keeps all."""
    if count == 0 or count >= logits.shape[1]:
        return logits
    bound = logits.topk(count, dim=1).values[:, -1:]
    return logits.masked_fill(logits < bound, -torch.inf)


def keep_top_p(logits: Float[Tensor, "b k"], probability: float) -> Float[Tensor, "b k"]:
    """Keep the fewest largest logits of each row with a total probability of `probability`; set the others to −∞."""
    if probability >= 1:
        return logits
    ordered, order = logits.sort(1, descending=True)
    probabilities = ordered.softmax(1)
    before = probabilities.cumsum(1) - probabilities
    removed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= probability)
    return logits.masked_fill(removed, -torch.inf)

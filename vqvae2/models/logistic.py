"""The discretized logistic distribution of 8-bit values (Salimans et al. 2017, arXiv 1701.05517, eq. 2)."""

import math

import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

_HALF_BIN = 1 / 255  # values are 2 / 255 apart in [-1, 1]
_LOG_BIN = math.log(2 * _HALF_BIN)
_MIN_LOG_SCALE = -7.0  # as in PixelCNN++; nearly all mass is then in one bin


def log_probability(
    values: UInt8[Tensor, "*s"], mean: Float[Tensor, "*s"], log_scale: Float[Tensor, "*s"]
) -> Float[Tensor, "*s"]:
    """Return the log-probability of each value in nats. The probabilities of the 256 values sum to 1.

    The probability is the mass of a logistic distribution in the value's bin, σ(a) − σ(b) with the bounds a > b of the
    bin; the bins of 0 and 255 are unbounded. It is computed without cancellation as σ(a) σ(−b) (1 − exp(b − a)).

    Args:
        mean: Mean of the logistic distribution; 0 and 255 are at −1 and 1.
        log_scale: Logarithm of its scale, at least −7; lower values are clamped.
    """
    log_scale = log_scale.clamp_min(_MIN_LOG_SCALE)
    centered, inverse = values.to(mean.dtype) / 127.5 - 1 - mean, (-log_scale).exp()
    upper, lower = (centered + _HALF_BIN) * inverse, (centered - _HALF_BIN) * inverse
    below, above = F.logsigmoid(upper), F.logsigmoid(-lower)
    within = (-(-(_LOG_BIN - log_scale).exp()).expm1()).log()
    first, last = values == 0, values == 255
    return below.masked_fill(last, 0) + above.masked_fill(first, 0) + within.masked_fill(first, 0).masked_fill(last, 0)

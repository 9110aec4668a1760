"""Mutual information of labels."""

import math

import numpy as np
from jaxtyping import Int

from vqvae2.packages import import_package


def mutual_information(first: Int[np.ndarray, " n"], second: Int[np.ndarray, " n"]) -> float:
    """Return the mutual information of paired labels in bits, estimated from their joint frequencies."""
    return import_package("sklearn.metrics", "speech").mutual_info_score(first, second) / math.log(2)

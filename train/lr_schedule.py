"""The learning-rate schedule: linear warmup, then constant or cosine decay to 0."""

import math

from vqvae2.training_config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0.

    >>> config = TrainingConfig(steps=100, learning_rate=1.0, warmup_steps=10, schedule="cosine")
    >>> [round(learning_rate(config, step), 2) for step in (0, 9, 10, 55, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    first, end = config.phase(step)
    since_warmup = step - first - config.warmup_steps
    if since_warmup < 0:
        return config.learning_rate * (step - first + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = since_warmup / max(1, end - first - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

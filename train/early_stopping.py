"""Track the best validation, and stop when it no longer improves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """The best value of the monitored metric, lower is better.

    Args:
        patience: Number of validations without improvement after which to stop, or None to never stop early.
    """

    patience: int | None
    best_step: int = 0
    best_value: float = math.inf
    bad_validations: int = 0

    def update(self, step: int, value: float) -> bool:
        """Record a validation, and return whether it is the best so far."""
        improved = value < self.best_value
        self.bad_validations = 0 if improved else self.bad_validations + 1
        if improved:
            self.best_step, self.best_value = step, value
        return improved

    @property
    def should_stop(self) -> bool:
        """Whether the patience is exhausted."""
        return self.patience is not None and self.bad_validations >= self.patience

    def state(self) -> list[float] | None:
        """Return the state as JSON, or None before the first improvement."""
        return [self.best_step, self.best_value, self.bad_validations] if self.best_step else None

    def restore(self, state: Sequence[float] | None) -> None:
        """Restore a state that `state` returned."""
        step, value, bad = state or (0, math.inf, 0)
        self.best_step, self.best_value, self.bad_validations = int(step), float(value), int(bad)

"""Exponential moving average of a network's weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Averaged weights of a network, which replace its weights for validation and in the result.

    The decay is min(`decay`, (1 + step) / (10 + step)), so that the random initial weights are forgotten quickly.

    Args:
        decay: Decay per step, or None to keep no average.
    """

    def __init__(self, network: nn.Module, decay: float | None) -> None:
        self.network, self.decay = network, decay
        self.average = {name: p.detach().clone() for name, p in network.named_parameters()} if decay else {}
        self._parameters = [parameter.detach() for parameter in network.parameters()] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the current weights, those after `step` optimizer steps."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), self._parameters, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averaged weights, if any, and evaluation mode inside the block."""
        parameters: dict[str, Tensor] = dict(self.network.named_parameters())
        current = {name: parameters[name].detach().clone() for name in self.average}
        copy_tensors(parameters, self.average)
        training = self.network.training
        self.network.eval()
        try:
            yield
        finally:
            self.network.train(training)
            copy_tensors(parameters, current)


@torch.no_grad()
def copy_tensors(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy each value into the target of the same name."""
    for name, value in values.items():
        targets[name].copy_(value)

"""The base class of stages that train codebooks: first steps without quantization, updates, usage in the log."""

from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from train.loop import NetworkT, TrainingStage
from train.losses import CodebookUsageTracker
from vqvae2.quantizers import GradientQuantizer, Quantizer


class QuantizedObjective(nn.Module):
    """Base class of objectives of networks with codebooks."""

    quantized = True  # False in the first steps
    usage: CodebookUsageTracker | None = None  # of the training batches; None does not log it


QuantizedObjectiveT = TypeVar("QuantizedObjectiveT", bound=QuantizedObjective)


class QuantizedStage(TrainingStage[NetworkT, QuantizedObjectiveT], Generic[NetworkT, QuantizedObjectiveT]):
    """Training of a network with codebooks, which are updated after each optimizer step."""

    quantizers: Iterable[nn.Module]
    first_quantized_step: int

    def before_update(self, step: int) -> None:
        self.objective.quantized = step >= self.first_quantized_step

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        for quantizer in self.quantizers:
            assert isinstance(quantizer, Quantizer)
            quantizer.update()
            if isinstance(quantizer, GradientQuantizer) and quantizer.restarted is not None:
                reset_moments(optimizer, quantizer.embedding, quantizer.restarted)

    def logged_values(self) -> dict[str, float]:
        return self.objective.usage.take() if self.objective.usage else {}

    def pending_values(self) -> dict[str, list[int]]:
        return self.objective.usage.pending() if self.objective.usage else {}

    def restore_pending(self, pending: dict[str, list[int]]) -> None:
        if self.objective.usage:
            self.objective.usage.resume(pending, next(self.network.parameters()).device)


@torch.no_grad()
def reset_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Zero the optimizer's moments of a parameter's rows for which `rows` (K,) is true: codes that were restarted."""
    for moment in optimizer.state.get(parameter, {}).values():
        if moment.shape == parameter.shape:
            moment.masked_fill_(rows[:, None], 0)

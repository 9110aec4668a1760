"""The state of a training run, and its checkpoints: one safetensors file each, in a folder named for the step."""

import contextlib
import math
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqvae2 import checkpoint, files
from vqvae2.errors import UserError

_STATE = "state.safetensors"


class Optimized(NamedTuple):
    """An objective with all its weights, and the optimizer that moves them."""

    objective: nn.Module
    optimizer: torch.optim.Optimizer


class TrainingState:
    """Everything that a step reads and changes: weights, their average, the optimizers' moments, the step.

    `optimized` is by prefix of the names in a file: "" for what is trained, one for each auxiliary.
    """

    def __init__(
        self,
        network: nn.Module,
        optimized: dict[str, Optimized],
        average: float | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.network, self.optimized, self.scaler = network, optimized, scaler
        self.decay = average
        self.average = {name: p.detach().clone() for name, p in network.named_parameters()} if average else {}
        self.step = 0
        self.seconds = 0.0
        self.last_validation: dict[str, float] = {}
        self.best_step, self.best_value = 0, math.inf  # of the value that judges the network, lower is better
        self.bad_validations = 0  # validations since then
        self.unlogged: dict[str, dict[str, Any]] = {"terms": {}, "stage": {}}  # gathered since the log's last entry

    def record_validation(self, value: float) -> bool:
        """Take in a validation's value; whether it is the best so far."""
        better = value < self.best_value
        self.bad_validations = 0 if better else self.bad_validations + 1
        if better:
            self.best_step, self.best_value = self.step, value
        return better

    @torch.no_grad()
    def advance(self, seconds: float) -> None:
        """Count a step, and take the new weights into the average."""
        self.step, self.seconds = self.step + 1, seconds
        if self.decay:
            # A short memory at first, so that the random start is forgotten soon.
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            parameters = dict(self.network.named_parameters())
            for name, average in self.average.items():
                average.lerp_(parameters[name], 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the network into evaluation mode, with the averaged weights if there are any, while the block runs."""
        parameters: dict[str, Tensor] = dict(self.network.named_parameters())
        latest = {name: parameters[name].detach().clone() for name in self.average}
        _set(parameters, self.average)
        training = self.network.training
        self.network.eval()
        try:
            yield
        finally:
            self.network.train(training)
            _set(parameters, latest)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        named = {f"average/{name}": tensor for name, tensor in self.average.items()}
        for prefix, (objective, optimizer) in self.optimized.items():
            named |= {f"{prefix}objective/{name}": tensor for name, tensor in objective.state_dict().items()}
            for index, values in optimizer.state_dict()["state"].items():
                named |= {f"{prefix}optimizer/{index}/{name}": torch.as_tensor(v) for name, v in values.items()}
        return named

    def metadata(self) -> dict[str, Any]:
        """Everything that is not a tensor, as JSON."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "last_validation": self.last_validation,
            "best": [self.best_step, self.best_value, self.bad_validations] if self.best_step else None,
            "unlogged": self.unlogged,
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def restore(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Take over the state that the file `path` holds."""
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, rest = name.split("/", 1)
            groups.setdefault(kind, {})[rest] = tensor
        for prefix, (objective, optimizer) in self.optimized.items():
            checkpoint.load_state_dict(objective, groups.get(f"{prefix}objective", {}), path)
            _fill_moments(optimizer, groups.get(f"{prefix}optimizer", {}))
        averages = groups.get("average", {})
        if averages.keys() != self.average.keys():
            raise UserError(f"{path}: made with another setting of `ema_decay`")
        _set(self.average, averages)
        if self.scaler and metadata["scaler"]:
            self.scaler.load_state_dict(metadata["scaler"])
        self.step, self.seconds = metadata["step"], metadata["seconds"]
        self.last_validation, self.unlogged = metadata["last_validation"], metadata["unlogged"]
        self.best_step, self.best_value, self.bad_validations = metadata.get("best") or (0, math.inf, 0)


class Checkpoints:
    """The newest few checkpoints in a folder, and the best; a damaged one is passed over for the one before it."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint, complete or not at all, then remove the oldest ones but the best."""
        with files.atomic_write(self._of(state.step)) as partial:
            partial.mkdir()
            checkpoint.save(partial / _STATE, state.tensors(), state.metadata())
        for old in self.all()[: -self.keep]:
            if old != self._of(state.best_step):
                shutil.rmtree(old)

    def restore(self, state: TrainingState) -> bool:
        """Take over the newest checkpoint that is undamaged; whether there was one."""
        for folder in reversed(self.all()):
            try:
                loaded = checkpoint.load(folder / _STATE)
            except UserError:
                before = [other for other in self.all() if other < folder]
                instead = "using the one before it" if before else "there is none before it, so training begins anew"
                warnings.warn(f"{folder}: damaged checkpoint; {instead}", stacklevel=2)
                continue
            state.restore(folder / _STATE, *loaded)
            return True
        return False

    def restore_best(self, state: TrainingState) -> None:
        """Take over the checkpoint of the best validation; where it is missing or damaged, the state stays."""
        file = self._of(state.best_step) / _STATE
        try:
            loaded = checkpoint.load(file)
        except UserError as error:
            warnings.warn(f"{error}; step {state.step} becomes the result in place of the best", stacklevel=2)
        else:
            state.restore(file, *loaded)

    def all(self) -> list[Path]:
        """Folders of the checkpoints, oldest first."""
        return sorted(folder for folder in self.folder.glob("[0-9]*") if folder.is_dir())

    def newest(self) -> Path | None:
        """The newest one."""
        return next(reversed(self.all()), None)

    def _of(self, step: int) -> Path:
        return self.folder / f"{step:08d}"


def _fill_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer its state; `tensors` are named INDEX/VALUE, and none where it has made no step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, value = name.split("/", 1)
        parameter = parameters[int(index)]
        # In the memory order of the weights, be it channels last: a fused optimizer walks through both side by side.
        like = parameter if tensor.shape == parameter.shape else tensor
        moments.setdefault(int(index), {})[value] = torch.empty_like(like, device=parameter.device).copy_(tensor)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})


@torch.no_grad()
def _set(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        targets[name].copy_(value)

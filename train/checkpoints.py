"""The training state, and its checkpoints: one safetensors file each, in a folder named after the step."""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train.early_stopping import EarlyStopping
from train.ema import ExponentialMovingAverage, copy_tensors
from vqvae2 import checkpoint, files
from vqvae2.errors import UserError

_STATE = "state.safetensors"


class Optimized(NamedTuple):
    """A module with all its parameters and buffers, and its optimizer."""

    module: nn.Module
    optimizer: torch.optim.Optimizer


class TrainingState:
    """Everything that a training step reads and changes.

    Args:
        optimized: Modules and optimizers by the prefix of their names in a checkpoint: "" for the trained network, one
            more for each auxiliary network.
        made_from: Digests of what the stage trains on, by name. A checkpoint with other ones is refused.
    """

    def __init__(
        self,
        optimized: dict[str, Optimized],
        ema: ExponentialMovingAverage,
        early_stopping: EarlyStopping,
        scaler: torch.amp.GradScaler | None,
        made_from: dict[str, str | None],
    ) -> None:
        self.made_from = made_from
        self.optimized, self.ema, self.early_stopping, self.scaler = optimized, ema, early_stopping, scaler
        self.step = 0
        self.seconds = 0.0
        self.last_validation: dict[str, float] = {}
        self.unlogged: dict[str, dict[str, Any]] = {"terms": {}, "stage": {}}  # values since the last log entry

    def advance(self, seconds: float) -> None:
        """Count a step, and update the averaged weights."""
        self.step, self.seconds = self.step + 1, seconds
        self.ema.update(self.step)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        named = {f"ema/{name}": tensor for name, tensor in self.ema.average.items()}
        for prefix, (module, optimizer) in self.optimized.items():
            named |= {f"{prefix}objective/{name}": tensor for name, tensor in module.state_dict().items()}
            for index, values in optimizer.state_dict()["state"].items():
                named |= {f"{prefix}optimizer/{index}/{name}": torch.as_tensor(v) for name, v in values.items()}
        return named

    def metadata(self) -> dict[str, Any]:
        """Return everything that is not a tensor, as JSON."""
        return {
            "made_from": self.made_from,
            "step": self.step,
            "seconds": self.seconds,
            "last_validation": self.last_validation,
            "best": self.early_stopping.state(),
            "unlogged": self.unlogged,
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def restore(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Restore the state read from the file `path`.

        Raises:
            UserError: If it belongs to another training.
        """
        check_made_from(metadata.get("made_from", {}), self.made_from, path)
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, rest = name.split("/", 1)
            groups.setdefault(kind, {})[rest] = tensor
        for prefix, (module, optimizer) in self.optimized.items():
            checkpoint.load_state_dict(module, groups.get(f"{prefix}objective", {}), path)
            _restore_optimizer(optimizer, groups.get(f"{prefix}optimizer", {}))
        averages = groups.get("ema", {})
        if averages.keys() != self.ema.average.keys():
            raise UserError(f"{path}: made with another setting of `ema_decay`")
        copy_tensors(self.ema.average, averages)
        if self.scaler and metadata["scaler"]:
            self.scaler.load_state_dict(metadata["scaler"])
        self.step, self.seconds = metadata["step"], metadata["seconds"]
        self.last_validation, self.unlogged = metadata["last_validation"], metadata["unlogged"]
        self.early_stopping.restore(metadata.get("best"))


def check_made_from(found: Mapping[str, Any], expected: Mapping[str, str | None], path: Path) -> None:
    """Check that a file in the folder of a stage was made from the artifacts that the stage reads now.

    Raises:
        UserError: If one of them is another one. The message names it.
    """
    for name, digest in expected.items():
        if found.get(name) != digest:
            raise UserError(
                f"{path}: trained on another `{name}` than the one in the run folder. "
                "Delete the folder of the stage to train it again."
            )


class Checkpoints:
    """The most recent checkpoints in a folder, and the best one."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint atomically, then remove the oldest ones, but not the best."""
        with files.atomic_write(self._path(state.step)) as partial:
            partial.mkdir()
            checkpoint.save(partial / _STATE, state.tensors(), state.metadata())
        for old in self.all()[: -self.keep]:
            if old != self._path(state.early_stopping.best_step):
                shutil.rmtree(old)

    def restore(self, state: TrainingState) -> bool:
        """Restore the most recent undamaged checkpoint, and return whether there was one."""
        for folder in reversed(self.all()):
            try:
                loaded = checkpoint.load(folder / _STATE)
            except UserError:
                earlier = [other for other in self.all() if other < folder]
                fallback = "using the previous one" if earlier else "there is no earlier one; training starts over"
                warnings.warn(f"{folder}: damaged checkpoint; {fallback}", stacklevel=2)
                continue
            state.restore(folder / _STATE, *loaded)
            return True
        return False

    def restore_best(self, state: TrainingState) -> None:
        """Restore the checkpoint of the best validation. If it is missing or damaged, warn and keep the state."""
        file = self._path(state.early_stopping.best_step) / _STATE
        try:
            loaded = checkpoint.load(file)
        except UserError as error:
            warnings.warn(f"{error}; saving the weights of step {state.step} instead of the best", stacklevel=2)
        else:
            state.restore(file, *loaded)

    def all(self) -> list[Path]:
        """Return the folders of the checkpoints, oldest first."""
        return sorted(folder for folder in self.folder.glob("[0-9]*") if folder.is_dir())

    def newest(self) -> Path | None:
        """Return the folder of the most recent checkpoint, or None."""
        return next(reversed(self.all()), None)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore an optimizer's state from tensors named INDEX/NAME; there are none before its first step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, value = name.split("/", 1)
        parameter = parameters[int(index)]
        # Same memory format as the weights (may be channels-last), which fused optimizers require.
        like = parameter if tensor.shape == parameter.shape else tensor
        state.setdefault(int(index), {})[value] = torch.empty_like(like, device=parameter.device).copy_(tensor)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

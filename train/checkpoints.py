"""The training state, and its checkpoints: one safetensors file each, in a folder named after the step."""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from train.early_stopping import EarlyStopping
from train.ema import ExponentialMovingAverage, copy_tensors
from vqvae2 import checkpoint, files
from vqvae2.config import Config, Measured
from vqvae2.errors import UserError

_STATE = "state.safetensors"
_FIX = "Delete the checkpoint's folder and run the same command again; it resumes from the previous one."


_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, in addition to the number of steps


class _Unlogged(Config):
    """Values since the last log entry."""

    terms: dict[str, list[Measured]]
    stage: dict[str, list[Annotated[int, Field(ge=0, lt=2**63)]]]


class _Progress(Config):
    """Everything in a checkpoint that is not a tensor."""

    step: int = Field(ge=0, le=2**40)
    seconds: float = Field(ge=0, le=1e12)
    last_validation: dict[str, Measured]
    best: tuple[Annotated[int, Field(ge=0, le=2**40)], Measured, Annotated[int, Field(ge=0, le=2**40)]] | None = None
    unlogged: _Unlogged
    scaler: dict[str, int | float] | None = None
    made_from: dict[str, str | None] = Field(default_factory=dict)


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

    def non_finite(self) -> str | None:
        """Return the name of a tensor with NaN or infinite values, or None. Reads from the device once."""
        floating = {name: each for name, each in self.tensors().items() if each.is_floating_point()}
        finite = torch.stack([each.isfinite().all() for each in floating.values()]).tolist() if floating else []
        return next((name for name, is_finite in zip(floating, finite, strict=True) if not is_finite), None)

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
            UserError: If the state is invalid, or belongs to another network or another training.
        """
        progress = _Progress.from_dict(metadata, str(path), fix=_FIX)
        check_made_from(progress.made_from, self.made_from, path)
        if f"{progress.step:08d}" != path.parent.name:
            raise UserError(f"{path}: the state of step {progress.step:,}, which is not the name of its folder. {_FIX}")
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            groups.setdefault(kind, {})[rest] = tensor
        for prefix, (module, optimizer) in self.optimized.items():
            checkpoint.load_state_dict(module, groups.pop(f"{prefix}objective", {}), path)
            moments = groups.pop(f"{prefix}optimizer", {})
            if not (prefix or moments) and progress.step:
                raise UserError(f"{path}: no state of the optimizer. {_FIX}")
            _restore_optimizer(optimizer, moments, path)
        averages = groups.pop("ema", {})
        if averages.keys() != self.ema.average.keys():
            raise UserError(f"{path}: made with another setting of `ema_decay`")
        for name, average in self.ema.average.items():
            _check_like(path, f"ema/{name}", averages[name], average)
        if groups:
            raise UserError(f"{path}: unexpected tensors `{next(iter(groups))[:80]}`. {_FIX}")
        copy_tensors(self.ema.average, averages)
        if self.scaler and progress.scaler:
            if progress.scaler.keys() != self.scaler.state_dict().keys():
                raise UserError(f"{path}: scaler: not the state of a gradient scaler. {_FIX}")
            self.scaler.load_state_dict(progress.scaler)
        self.step, self.seconds = progress.step, progress.seconds
        self.last_validation, self.unlogged = progress.last_validation, progress.unlogged.model_dump()
        self.early_stopping.restore(progress.best)


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
        """Write a checkpoint atomically, then remove the oldest ones, but not the best.

        Later ones are removed, too: they are damaged, and training resumed from an earlier one.
        """
        with files.atomic_write(self._path(state.step)) as partial:
            partial.mkdir()
            checkpoint.save(partial / _STATE, state.tensors(), state.metadata())
        folders, best = self.all(), self._path(state.early_stopping.best_step)
        kept = [folder for folder in folders if int(folder.name) <= state.step][-self.keep :]
        for folder in folders:
            if folder not in (*kept, best):
                shutil.rmtree(folder)

    def restore(self, state: TrainingState) -> bool:
        """Restore the most recent undamaged checkpoint, and return whether there was one."""
        folders = self.all()
        for folder in reversed(folders):
            try:
                loaded = checkpoint.load(folder / _STATE)
            except UserError:
                is_first = folder == folders[0]
                fallback = "there is no earlier one; training starts over" if is_first else "using the previous one"
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
        folders = [folder for folder in self.folder.glob("[0-9]*") if folder.is_dir() and folder.name.isdecimal()]
        return sorted(folders, key=lambda folder: int(folder.name))  # names of 100,000,000 steps are longer

    def newest(self) -> Path | None:
        """Return the folder of the most recent checkpoint, or None."""
        return next(reversed(self.all()), None)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], path: Path) -> None:
    """Restore an optimizer's state from tensors named INDEX/NAME; there are none before its first step.

    Raises:
        UserError: If they are not the state of this optimizer. `path` is named in the error.
    """
    parameters = {str(i): p for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, value = name.partition("/")
        if index not in parameters or value not in ("step", *_MOMENTS):
            raise UserError(f"{path}: unexpected tensor `optimizer/{name[:80]}`. {_FIX}")
        parameter = parameters[index]
        _check_like(path, f"optimizer/{name}", tensor, parameter if value in _MOMENTS else torch.zeros(()))
        # Same memory format as the weights (may be channels-last), which fused optimizers require.
        like = parameter if tensor.shape == parameter.shape else tensor
        state.setdefault(int(index), {})[value] = torch.empty_like(like, device=parameter.device).copy_(tensor)
    for index, values in state.items():
        if len(values) < 1 + len(_MOMENTS):
            raise UserError(f"{path}: the optimizer state of parameter {index} is incomplete. {_FIX}")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _check_like(path: Path, name: str, found: Tensor, expected: Tensor) -> None:
    """Raise UserError if a tensor has another shape or type than expected, or a value that is not finite."""
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise UserError(
            f"{path}: `{name}` is {found.dtype} {tuple(found.shape)}, expected {expected.dtype} "
            f"{tuple(expected.shape)}. {_FIX}"
        )
    if not found.isfinite().all():
        raise UserError(f"{path}: `{name}` is not finite. {_FIX}")

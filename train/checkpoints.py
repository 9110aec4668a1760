"""The state of a training run, and its checkpoints: one safetensors file each, in a folder named for the step."""

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqvae2 import checkpoint, files
from vqvae2.errors import UserError


class TrainingState:
    """Everything that a step reads and changes: weights, their average, the optimizer's moments, the step."""

    def __init__(
        self,
        network: nn.Module,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: float | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.network, self.objective, self.optimizer, self.scaler = network, objective, optimizer, scaler
        self.decay = average
        self.average = {name: p.detach().clone() for name, p in network.named_parameters()} if average else {}
        self.step = 0
        self.seconds = 0.0
        self.last_validation: dict[str, float] = {}

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
        named = {f"objective/{name}": tensor for name, tensor in self.objective.state_dict().items()}
        named |= {f"average/{name}": tensor for name, tensor in self.average.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            named |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in values.items()}
        return named

    def metadata(self) -> dict[str, Any]:
        """Everything that is not a tensor, as JSON."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "last_validation": self.last_validation,
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def restore(self, path: Path, device: torch.device) -> None:
        """Take over the state in a file."""
        tensors, metadata = checkpoint.load(path)
        groups: dict[str, dict[str, Tensor]] = {"objective": {}, "average": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, rest = name.split("/", 1)
            groups[kind][rest] = tensor
        checkpoint.fill(self.objective, groups["objective"], path)
        if groups["average"].keys() != self.average.keys():
            raise UserError(f"{path}: made with another setting of `average`")
        _set(self.average, groups["average"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            index, value = name.split("/", 1)
            moments.setdefault(int(index), {})[value] = tensor.to(device)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        if self.scaler and metadata["scaler"]:
            self.scaler.load_state_dict(metadata["scaler"])
        self.step, self.seconds = metadata["step"], metadata["seconds"]
        self.last_validation = metadata["last_validation"]


class Checkpoints:
    """The newest few checkpoints in a folder; a damaged one is passed over for the one before it."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint, complete or not at all, then remove the oldest ones."""
        with files.atomic(self.folder / f"{state.step:08d}") as partial:
            partial.mkdir()
            checkpoint.save(partial / "state.safetensors", state.tensors(), state.metadata())
            digest = files.digest(partial / "state.safetensors")
            (partial / "state.sha256").write_text(f"{digest}  state.safetensors\n")
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)

    def restore(self, state: TrainingState, device: torch.device) -> bool:
        """Take over the newest checkpoint that is undamaged; whether there was one."""
        for folder in reversed(self.all()):
            file = folder / "state.safetensors"
            if not file.is_file() or not _is_intact(file):
                warnings.warn(f"{folder}: damaged checkpoint; using the one before it", stacklevel=2)
                continue
            state.restore(file, device)
            return True
        return False

    def all(self) -> list[Path]:
        """Folders of the checkpoints, oldest first."""
        return sorted(folder for folder in self.folder.glob("[0-9]*") if folder.is_dir())

    def newest(self) -> Path | None:
        """The newest one."""
        return next(reversed(self.all()), None)


def _is_intact(file: Path) -> bool:
    note = file.with_name("state.sha256")
    return note.is_file() and note.read_text().split()[:1] == [files.digest(file)]


@torch.no_grad()
def _set(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        targets[name].copy_(value)

"""The log of a training run: means of training values and validation results, as JSON lines and as curves."""

import json
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vqvae2 import files
from vqvae2.distributed import all_reduce_sum, get_world_size
from vqvae2.pictures import save_curves


class StepValues(NamedTuple):
    """Values of one step, on the device."""

    step: int
    names: tuple[str, ...]
    values: Tensor  # (names,)


class MetricLog:
    """Averages the values of single steps, and appends the means to a JSON-lines file.

    Values stay on their device until `read`, so that adding them does not wait for it.

    Args:
        writes: Whether this process writes the file.
    """

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.entries: list[dict[str, float]] = []
        self.pending: dict[str, list[float]] = {}  # values since the last training entry
        self._unread: list[StepValues] = []

    def resume(self, step: int, pending: dict[str, list[float]]) -> None:
        """Discard entries after `step`, which will be repeated, and continue with the pending values."""
        self.pending = pending
        if self.path.is_file():
            self.entries = [entry for entry in files.read_log(self.path) if entry["step"] <= step]
        last = step - max(map(len, pending.values()), default=0)  # step of the last training entry
        if self.writes and last > 0 and all(entry["step"] != last for entry in self.entries):
            warnings.warn(f"{self.path}: lacks entries of earlier steps; the curves start later", stacklevel=2)
        if self.writes:
            files.write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def add(self, values: StepValues) -> None:
        """Add the values of one step."""
        self._unread.append(values)

    def read(self) -> list[tuple[int, dict[str, float]]]:
        """Copy the values of all steps since the last call to `pending`, and return them with their steps.

        Values are means over all ranks, so that every rank sees a NaN. Every rank must call this after the same steps.
        """
        steps, self._unread = self._unread, []
        if not steps:
            return []
        numbers = (all_reduce_sum(torch.cat([each.values for each in steps])) / get_world_size()).tolist()
        found = []
        for step, names, _ in steps:
            values, numbers = dict(zip(names, numbers, strict=False)), numbers[len(names) :]
            for name, value in values.items():
                self.pending.setdefault(name, []).append(value)
            found.append((step, values))
        return found

    def write_means(self, step: int, split: str, extra: dict[str, float] | None = None) -> dict[str, float]:
        """Write the means since the last call together with `extra`, and return them as `SPLIT/NAME`: value."""
        means = {name: sum(values) / len(values) for name, values in self.pending.items()} | (extra or {})
        self.pending = {}
        return self.write(step, split, means)

    def write(self, step: int, split: str, values: dict[str, float]) -> dict[str, float]:
        """Write values, and return them as `SPLIT/NAME`: value."""
        entry = {f"{split}/{name}": value for name, value in values.items()}
        self.entries.append({"step": step} | entry)
        if self.writes:
            with files.named_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.entries[-1]) + "\n")
        return entry

    def plot(self, path: Path, panels: dict[str, list[str]], title: str) -> None:
        """Write a picture with one panel of curves per entry of `panels`: title → names of logged values."""
        save_curves(
            path, {panel: {name: self._points(name) for name in names} for panel, names in panels.items()}, title
        )

    def _points(self, name: str) -> list[tuple[float, float]]:
        return [
            (float(entry["step"]), entry[name]) for entry in self.entries if math.isfinite(entry.get(name, math.nan))
        ]

"""What training measured, step by step: means over each interval, kept as JSON lines, drawn as curves."""

import json
import math
from pathlib import Path

from vqvae2 import files
from vqvae2.pictures import save_curves


class MetricLog:
    """Gathers values of single steps and logs their means to `history.jsonl` in a folder."""

    def __init__(self, folder: Path, writes: bool) -> None:
        self.path, self.writes = folder / "history.jsonl", writes
        self.entries: list[dict[str, float]] = []
        self.gathered: dict[str, list[float]] = {}  # since the last training entry

    def resume(self, step: int, gathered: dict[str, list[float]]) -> None:
        """Forget what was logged after `step`, which is about to happen again, and go on with what was gathered."""
        self.gathered = gathered
        if self.path.is_file():
            self.entries = [entry for entry in files.read_log(self.path) if entry["step"] <= step]
        if self.writes:
            files.write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in self.entries))

    def gather(self, values: dict[str, float]) -> None:
        """Take in the values of one step."""
        for name, value in values.items():
            self.gathered.setdefault(name, []).append(value)

    def log(self, step: int, split: str, also: dict[str, float] | None = None) -> dict[str, float]:
        """Write the means since the last call; the same values under names like `train/loss`."""
        means = {name: sum(values) / len(values) for name, values in self.gathered.items()} | (also or {})
        self.gathered = {}
        return self.write(step, split, means)

    def write(self, step: int, split: str, values: dict[str, float]) -> dict[str, float]:
        """Write values as they are; the same under names like `validation/nll`."""
        entry = {f"{split}/{name}": value for name, value in values.items()}
        self.entries.append({"step": step} | entry)
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.entries[-1]) + "\n")
        return entry

    def draw(self, path: Path, panels: dict[str, list[str]], title: str) -> None:
        """Draw panels of curves, each a title with the names of logged values."""
        save_curves(
            path, {panel: {name: self._points(name) for name in names} for panel, names in panels.items()}, title
        )

    def _points(self, name: str) -> list[tuple[float, float]]:
        return [
            (float(entry["step"]), entry[name]) for entry in self.entries if math.isfinite(entry.get(name, math.nan))
        ]

"""What a run folder holds, finished or not: how far each stage is, what it measured, and what it was made with.

Everything comes from settings and JSON that the stages have left there; no weights are read.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sampling.evaluation.training_checks import codebook_warnings, prior_warnings
from vqvae2 import files
from vqvae2.code_maps import MapSpec
from vqvae2.config import read_yaml
from vqvae2.data import lmdb_store
from vqvae2.data.code_store import CodeStore
from vqvae2.data.images import DataConfig
from vqvae2.errors import UserError
from vqvae2.models import AutoencoderConfig
from vqvae2.run_folder import RunFolder, level_names


@dataclass(frozen=True)
class Stage:
    """How far one stage is, and what it measured."""

    state: str  # "finished", "under way" or "not yet"
    detail: str = ""
    seconds: float | None = None
    values: dict[str, float] = field(default_factory=dict)  # of its last validation; empty before the first


@dataclass(frozen=True)
class RunStatus:
    """What a run folder holds."""

    folder: RunFolder
    samples: Path
    data: DataConfig
    maps: dict[str, MapSpec]  # by level, finest first
    stages: dict[str, Stage]  # in the order of work
    manifest: dict[str, Any] | None
    metrics: dict[str, Any] | None
    diagnosis: dict[str, Any] | None  # what `vqvae2 diagnose` says of its pictures
    warnings: tuple[str, ...]  # about what the stages have measured

    @property
    def name(self) -> str:
        """The run's name, that of its folder."""
        return self.folder.path.resolve().name

    def prior(self, level: str) -> Stage:
        """The stage of one level's prior."""
        return self.stages[f"prior-{level}"]


def read_run(folder: RunFolder, samples: Path | None = None) -> RunStatus:
    """What a run folder holds now, and what `samples` does (RUN/samples by default); UserError for a damaged file."""
    config, source = read_yaml(folder.config), str(folder.config)
    samples = samples or folder.samples
    try:
        network = {name: config["autoencoder"][name] for name in AutoencoderConfig.model_fields}
        names = level_names(len(network["levels"]))
        steps = {name: config["priors"][name]["training"]["steps"] for name in reversed(names)}
        trained = _training(folder.autoencoder, config["autoencoder"]["training"]["steps"])
    except (KeyError, TypeError):
        raise UserError(f"{source}: not the settings of a run; `vqvae2 run` writes them into a new folder") from None
    data = DataConfig.parse(config.get("data", {}), source, "data")
    with torch.device("meta"):
        maps = AutoencoderConfig.parse(network, source, "autoencoder").build(data.shape, data.channels).map_specs
    stages = {
        "autoencoder": trained,
        "codes": _extraction(folder),
        **{f"prior-{name}": _training(folder.prior(name), count) for name, count in steps.items()},
        "samples": _sampling(samples),
        "evaluation": Stage("finished" if folder.metrics.is_file() else "not yet"),
    }
    warnings = codebook_warnings(trained.values, names)
    for name in names:
        warnings += prior_warnings(name, _entries(folder.prior(name) / "metrics.jsonl"))
    levels = dict(zip(names, maps, strict=True))
    manifest, diagnosis = _json(samples / "manifest.json"), _json(folder.path / "diagnosis" / "diagnosis.json")
    return RunStatus(folder, samples, data, levels, stages, manifest, _json(folder.metrics), diagnosis, tuple(warnings))


def _training(folder: Path, steps: int) -> Stage:
    """The stage of a network: its summary, or the end of its history where it has none yet."""
    summary = _json(folder / "summary.json") or {}
    step, values = _history(folder / "metrics.jsonl")
    values = summary.get("validation", values)
    if (folder / "model.safetensors").is_file():
        return Stage("finished", f"{steps:,} steps", summary.get("seconds"), values)
    return Stage("under way", f"step {step:,} of {steps:,}", None, values) if step else Stage("not yet")


def _history(path: Path) -> tuple[int, dict[str, float]]:
    """The last step that was logged, and the values of the last validation."""
    step, values = 0, {}
    for entry in _entries(path):
        step = int(entry["step"])
        values |= {name.removeprefix("validation/"): entry[name] for name in entry if name.startswith("validation/")}
    return step, values


def _entries(path: Path) -> list[dict[str, float]]:
    """What was logged, in the order of steps."""
    return files.read_log(path) if path.is_file() else []


def _extraction(folder: RunFolder) -> Stage:
    stores = [folder.code_store(split) for split in ("train", "val")]
    headers = [CodeStore.read_header(path) for path in stores if lmdb_store.exists(path)]
    if len(headers) < len(stores) or not all(header.complete for header in headers):
        return Stage("under way" if headers else "not yet")
    seconds = (_json(folder.codes / "summary.json") or {}).get("seconds")
    return Stage("finished", f"{sum(map(len, headers)):,} images", seconds)


def _sampling(samples: Path) -> Stage:
    manifest = _json(samples / "manifest.json")
    if manifest is None:
        return Stage("not yet")
    seconds = (_json(samples / "summary.json") or {}).get("seconds")
    found, count = len(list((samples / "images").glob("*.png"))), manifest["count"]
    if found < count:
        return Stage("under way", f"{found:,} of {count:,} images", seconds)
    return Stage("finished", f"{count:,} images", seconds)


def _json(path: Path) -> Any:
    return files.read_json(path) if path.is_file() else None

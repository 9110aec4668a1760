"""The status of a run folder: the progress of each stage, its metrics, and what the results were made from.

Only settings, JSON files and headers are read; no weights are loaded.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sampling.evaluation.metrics import read_metrics
from sampling.evaluation.training_checks import codebook_warnings, prior_warnings
from sampling.output_folder import SampleManifest, current_samples, read_manifest
from sampling.report.diagnosis import Diagnosis, read_diagnosis
from sampling.run_changes import RunChanges
from sampling.run_config import RunConfig
from sampling.summary import read_summary
from vqvae2 import files
from vqvae2.code_maps import MapSpec
from vqvae2.data import lmdb_environment
from vqvae2.data.code_store import CodeStore
from vqvae2.data.images import DataConfig
from vqvae2.run_folder import RunFolder, StageFolder


@dataclass(frozen=True)
class StageStatus:
    """Progress and metrics of one stage."""

    state: str  # "finished", "in progress" or "not started"
    detail: str = ""
    seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation; empty before the first one


@dataclass(frozen=True)
class RunStatus:
    """Contents of a run folder, finished or not."""

    folder: RunFolder
    samples: Path
    data: DataConfig
    maps: dict[str, MapSpec]  # by level, finest first
    progressive_levels: tuple[tuple[str, ...], ...]  # see `AutoencoderConfig.progressive_levels`
    stages: dict[str, StageStatus]  # in the order of execution
    manifest: SampleManifest | None  # of the samples
    metrics: dict[str, Any] | None  # written by `vqvae2 evaluate`
    diagnosis: Diagnosis | None  # written by `vqvae2 diagnose`
    warnings: tuple[str, ...]  # derived from the metrics of the stages
    changes: list[list[str]]  # rows: setting, stage, step, value before, value after

    @property
    def name(self) -> str:
        """Name of the run: the name of its folder."""
        return self.folder.path.resolve().name

    @property
    def finished(self) -> bool:
        """Whether every stage is finished."""
        return all(stage.state == "finished" for stage in self.stages.values())

    def prior(self, level: str) -> StageStatus:
        """Return the status of one level's prior."""
        return self.stages[f"prior-{level}"]


def read_run(folder: RunFolder, samples: Path | None = None) -> RunStatus:
    """Read the status of a run and of the folder `samples`; see `current_samples` for the default.

    Raises:
        UserError: If the config or a JSON file is damaged.
    """
    samples = samples or current_samples(folder)
    config = RunConfig.from_resolved_yaml(folder.config)
    names = config.levels
    manifest = read_manifest(samples, SampleManifest)
    with torch.device("meta"):
        maps = config.autoencoder.model.build(config.data.shape, config.data.channels).map_specs
    autoencoder = _training(folder.autoencoder, config.autoencoder.training.steps)
    stages = {
        "autoencoder": autoencoder,
        "codes": _extraction(folder),
        **{
            f"prior-{name}": _training(folder.prior(name), config.priors[name].training.steps)
            for name in reversed(names)
        },
        "samples": _sampling(samples, manifest),
        "evaluation": StageStatus("finished" if folder.metrics.is_file() else "not started"),
    }
    warnings = codebook_warnings(autoencoder.metrics, names)
    for name in names:
        keeps_best = config.priors[name].training.early_stopping_patience is not None
        warnings += prior_warnings(name, _log(folder.prior(name)), keeps_best)
    return RunStatus(
        folder,
        samples,
        config.data,
        dict(zip(names, maps, strict=True)),
        config.autoencoder.model.progressive_levels,
        stages,
        manifest=manifest,
        metrics=read_metrics(folder.metrics),
        diagnosis=read_diagnosis(folder.diagnosis, names),
        warnings=tuple(warnings),
        changes=[
            [each.setting, each.stage, f"{each.step:,}", str(each.before), str(each.after)]
            for each in RunChanges.read(folder).changes
        ],
    )


def _training(folder: StageFolder, steps: int) -> StageStatus:
    """Return the status of a training stage; its metrics come from the log until there is a summary."""
    summary = read_summary(folder.summary)
    step, metrics = 0, {}
    for entry in _log(folder):
        step = int(entry["step"])
        metrics |= {name.removeprefix("validation/"): entry[name] for name in entry if name.startswith("validation/")}
    if folder.weights.is_file():
        if summary:
            steps, metrics = summary.steps or steps, summary.validation
        detail = f"{steps:,} steps" if steps else "pretrained"
        return StageStatus("finished", detail, summary.seconds if summary else None, metrics)
    if step:
        return StageStatus("in progress", f"step {step:,} of {steps:,}", None, metrics)
    return StageStatus("not started")


def _extraction(folder: RunFolder) -> StageStatus:
    stores = [folder.code_store(split) for split in ("train", "val")]
    headers = [CodeStore.read_header(path) for path in stores if lmdb_environment.exists(path)]
    if len(headers) < len(stores) or not all(header.complete for header in headers):
        return StageStatus("in progress" if headers else "not started")
    summary = read_summary(folder.codes_summary)
    return StageStatus("finished", f"{sum(map(len, headers)):,} images", summary.seconds if summary else None)


def _sampling(samples: Path, manifest: SampleManifest | None) -> StageStatus:
    if manifest is None:
        return StageStatus("not started")
    summary = read_summary(samples / "summary.json")
    seconds = summary.seconds if summary else None
    existing, count = len(list((samples / "images").glob(f"*.{manifest.format}"))), manifest.count
    if existing < count:
        return StageStatus("in progress", f"{existing:,} of {count:,} images", seconds)
    return StageStatus("finished", f"{count:,} images", seconds)


def _log(folder: StageFolder) -> list[dict[str, float]]:
    """Return the entries of a stage's metric log in the order of steps."""
    return files.read_log(folder.metric_log) if folder.metric_log.is_file() else []

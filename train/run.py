"""One experiment: everything a YAML file says, and the run folder that it fills."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, model_validator

from sampling.evaluation.evaluate import EvaluationConfig
from sampling.processes import processes
from sampling.sample import SamplingConfig
from train.loop import TrainingConfig
from train.losses import LossConfig
from vqvae2 import files
from vqvae2.config import Config, differences, read_resolved
from vqvae2.data.images import DataConfig
from vqvae2.errors import UserError
from vqvae2.models import AutoencoderConfig
from vqvae2.priors import PriorConfig
from vqvae2.run_folder import RunFolder, level_names

# What may change between two commands on one run: none of it alters what the trained artefacts are.
_FREE = (
    "data.path",
    "data.num_workers",
    "data.max_unreadable_fraction",
    "codes.batch_size",
    "sampling",
    "evaluation",
    *(f"training.{name}" for name in ("log_every", "validate_every", "preview_every", "checkpoint_every")),
    "training.keep_checkpoints",
    "training.compile",
    "training.gradient_accumulation_steps",
    "gradient_checkpointing",
    "autoencoder.loss.perceptual.weights",
)


class AutoencoderSection(AutoencoderConfig):
    """The network, what its reconstructions are judged by, and how it is trained."""

    loss: LossConfig = LossConfig()
    unquantized_steps: int = Field(
        default=100,
        ge=0,
        description="first steps that pass every level's features through unquantized, a tenth of training at most: "
        "a level that starts quantized may shrink to a constant before the decoder has found a use for it",
    )
    training: TrainingConfig

    @model_validator(mode="after")
    def _check(self) -> "AutoencoderSection":
        if self.loss.adversarial.weight and self.training.mixed_precision == "fp16":
            raise ValueError(
                "loss.adversarial: two optimizers cannot share the loss scale that training.mixed_precision fp16 needs; "
                "use bf16, or no mixed precision"
            )
        return self

    @property
    def quantized_from(self) -> int:
        """The first step, from 0, that quantizes."""
        return min(self.unquantized_steps, self.training.steps // 10)

    @property
    def network(self) -> AutoencoderConfig:
        """The network's settings alone, as they are stored with its weights."""
        return AutoencoderConfig(**{name: getattr(self, name) for name in AutoencoderConfig.model_fields})


class CodesConfig(Config):
    """How codes are extracted."""

    batch_size: int = Field(default=64, ge=1, description="images encoded at once, on each process")
    flip: bool = Field(default=False, description="keep the codes of every training image's mirror image too")


class PriorSection(Config):
    """One level's prior and how it is trained."""

    model: PriorConfig
    label_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of training images shown without their label, for guidance"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="gradient checkpointing: less memory, blocks are computed a second time"
    )
    training: TrainingConfig


class Experiment(Config):
    """The sections of an experiment's YAML file."""

    run: str | None = Field(default=None, description="run folder; runs/<name of the config file> where not given")
    data: DataConfig = DataConfig()
    autoencoder: AutoencoderSection
    codes: CodesConfig = CodesConfig()
    priors: dict[str, PriorSection] = Field(description="by level: bottom, top; one level has `top` alone")
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check(self) -> "Experiment":
        names = level_names(len(self.autoencoder.levels))
        if sorted(self.priors) != sorted(names):
            raise ValueError(
                f"priors: an autoencoder of {len(names)} levels needs priors for {', '.join(names)}; "
                f"found {', '.join(self.priors) or 'none'}"
            )
        return self

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels, finest first."""
        return level_names(len(self.autoencoder.levels))


@dataclass(frozen=True)
class Run:
    """An experiment and its run folder."""

    experiment: Experiment
    folder: RunFolder


def open_run(command: str, arguments: list[str], description: str, level: bool = False) -> tuple[Run, str]:
    """Read `CONFIG.yaml [--run PATH] [--section.field value …]`, and begin or reopen the run folder.

    Gives the run and the value of --level where the command takes one. UserError where the folder belongs to a
    different experiment: it names the first setting that differs.
    """
    parser = argparse.ArgumentParser(
        prog=f"vqvae2 {command}",
        description=description,
        epilog="Any setting of the config can be given as --section.field VALUE, for example --data.path FOLDER.",
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, help="the experiment, a YAML file, or the config.yaml of a run folder")
    parser.add_argument("--run", type=Path, help="the run folder; runs/<name of the config file> by default")
    if level:
        parser.add_argument("--level", required=True, help="which prior: top, bottom, middle")
    known, overrides = parser.parse_known_args(arguments)
    experiment = Experiment.load(known.config).override(overrides)
    default = known.config.parent if known.config.name == "config.yaml" else Path("runs") / known.config.stem
    path = known.run or Path(experiment.run or default)
    experiment = experiment.model_copy(update={"run": str(path)})
    # Refused before anything is written: sizes that do not divide.
    _check_builds(experiment)
    with processes().main_process_first():  # the others then find what it has written
        folder = _begin(experiment, RunFolder(path))
    return Run(experiment, folder), known.level if level else ""


def _check_builds(experiment: Experiment) -> None:
    with torch.device("meta"):
        experiment.autoencoder.network.build(experiment.data.shape, experiment.data.channels)


def _begin(experiment: Experiment, folder: RunFolder) -> RunFolder:
    """Write the resolved config into a new run folder; in one that exists, check that it is the same experiment."""
    if folder.config.is_file():
        before = Experiment.parse(read_resolved(folder.config), str(folder.config))
        for key, old, new in differences(before.plain(), experiment.plain()):
            if key != "run" and not any(key.startswith(free) or f".{free}" in key for free in _FREE):
                raise UserError(
                    f"{folder.path}: this run was made with {key} = {json.dumps(old)}, not {json.dumps(new)}; "
                    "choose another folder with --run, or go back to the old setting"
                )
    elif folder.path.is_dir() and any(folder.path.iterdir()):
        raise UserError(f"{folder.path}: not empty and not a run folder; choose another with --run")
    if processes().is_main_process:
        files.write_text(folder.config, experiment.yaml())
    return folder


def print_main(text: str) -> None:
    """A line for the person at the terminal, from the main process alone."""
    if processes().is_main_process:
        print(text, flush=True)

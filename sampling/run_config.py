"""RunConfig: everything that one YAML file says about a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, model_validator

from sampling.evaluation.evaluation_config import EvaluationConfig
from sampling.params import SamplingConfig
from vqvae2.command_line import Options, parse
from vqvae2.config import Config
from vqvae2.data.images import DataConfig
from vqvae2.models import Autoencoder, AutoencoderConfig
from vqvae2.priors import PriorConfig
from vqvae2.run_folder import RunFolder, level_names
from vqvae2.training_config import (
    AutoencoderLossConfig,
    AutoencoderTrainingConfig,
    PriorLossConfig,
    PriorTrainingConfig,
    Tracker,
)


class AutoencoderStageConfig(Config):
    """Stage 1: the autoencoder and its training."""

    pretrained: str | None = Field(
        default=None,
        description="weights to start from: a run, a folder, a .safetensors file, or a hub id OWNER/NAME; the model "
        "section may then be left out of the config",
    )
    model: AutoencoderConfig = AutoencoderConfig()
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    training: AutoencoderTrainingConfig = AutoencoderTrainingConfig()

    @model_validator(mode="before")
    @classmethod
    def _take_pretrained_model(cls, data: Any) -> Any:
        """Take the settings of the model from the pretrained weights if they are not given."""
        if isinstance(data, dict) and isinstance(data.get("pretrained"), str) and data.get("model") is None:
            return data | {"model": Autoencoder.read_pretrained_config(data["pretrained"])[0].to_dict()}
        return data

    @model_validator(mode="after")
    def _check(self) -> "AutoencoderStageConfig":
        if not self.training.steps and self.pretrained is None:
            raise ValueError("training.steps: must be at least 1 without autoencoder.pretrained")
        if not self.training.first_decoder_step and self.pretrained is None:
            raise ValueError("training.decoder_steps: must be less than steps without autoencoder.pretrained")
        if self.loss.adversarial.weight and self.training.mixed_precision == "fp16":
            raise ValueError(
                "training.mixed_precision: fp16 does not work with loss.adversarial, because two optimizers cannot "
                "share one loss scale. Use bf16 or fp32."
            )
        return self


class ExtractCodesConfig(Config):
    """Stage 2: extraction of the codes of all images."""

    batch_size: int = Field(default=64, ge=1, le=2**16, description="images encoded at once, per process")
    flip: bool = Field(default=False, description="also store the codes of each training image's mirror image")


class PriorStageConfig(Config):
    """Stage 3: the prior of one level and its training."""

    model: PriorConfig
    loss: PriorLossConfig = PriorLossConfig()
    training: PriorTrainingConfig


class BaseRunConfig(Config):
    """What the YAML files of all kinds of runs have."""

    run: str | None = Field(default=None, description="run folder; runs/NAME for NAME.yaml if not given")


class RunConfig(BaseRunConfig):
    """The sections of a run's YAML file."""

    data: DataConfig = DataConfig()
    autoencoder: AutoencoderStageConfig
    extract_codes: ExtractCodesConfig = ExtractCodesConfig()
    priors: dict[str, PriorStageConfig] = Field(description="priors by level name: `bottom` and `top`, or `top` alone")
    tracker: Tracker = Field(
        default="tensorboard",
        description="where metrics and previews are logged, besides the run folder; wandb, mlflow: if installed",
    )
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if sorted(self.priors) != sorted(self.levels):
            raise ValueError(
                f"priors: an autoencoder with {len(self.levels)} levels needs priors for {', '.join(self.levels)}; "
                f"found {', '.join(self.priors) or 'none'}"
            )
        return self

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels, finest first."""
        return level_names(len(self.autoencoder.model.levels))


_Options = TypeVar("_Options", bound=Options)


def parse_with_run_defaults(cls: type[_Options], section: str, arguments: Sequence[str], prog: str) -> _Options:
    """Return a command's options; defaults come from a section of the config of the run folder that `run` names.

    If the run comes first, `--help` prints its values.
    """
    has_run = arguments and not arguments[0].startswith("-")
    options = parse(cls, [each for each in arguments if not (has_run and each in ("-h", "--help"))], prog)
    run: Path = options.run  # pyright: ignore[reportAttributeAccessIssue]
    folder = RunFolder(run)
    if not folder.config.is_file():
        return parse(cls, arguments, prog)
    defaults = dict(getattr(RunConfig.from_resolved_yaml(folder.config), section))
    return parse(cls, arguments, prog, default=cls.from_dict({"run": run, **defaults}, str(folder.config), section))

"""Settings of a speech experiment and its run folder."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from experiments.speech.autoencoder import SpeechAutoencoder, SpeechModelConfig, load_speech_autoencoder
from experiments.speech.recordings import Recordings, RecordingsConfig, open_recordings
from sampling.run_config import PriorStageConfig
from train.checkpoints import check_made_from
from train.run import ConfigOptions
from vqvae2 import checkpoint, files
from vqvae2.config import Config
from vqvae2.data.code_store import CodeStore
from vqvae2.errors import UserError
from vqvae2.priors import Prior, TransformerConfig, load_prior
from vqvae2.run_folder import RunFolder, StageFolder
from vqvae2.training_config import PriorTrainingConfig, TrainingConfig

_FIX = "Delete the folder and run `vqvae2 speech train` again."


class SpeechTrainingConfig(TrainingConfig):
    """How the autoencoder is trained."""

    steps: int = Field(default=100_000, ge=1, le=2**40, description="optimizer steps")
    batch_size: int = Field(default=8, ge=1, le=2**24, description="global batch size")
    unquantized_steps: int = Field(default=300, ge=0, description="first steps that train without quantization")
    spectrum_weight: float = Field(
        default=1.0,
        ge=0,
        description="weight of the error of a log-mel spectrogram predicted from the codes and the speaker; 0 removes "
        "this term, which the paper does not have",
    )


class SpeechConfig(Config):
    """The sections of a speech experiment's YAML file."""

    run: str | None = Field(default=None, description="run folder; runs/NAME for NAME.yaml if not given")
    data: RecordingsConfig = RecordingsConfig()
    model: SpeechModelConfig = SpeechModelConfig()
    training: SpeechTrainingConfig = SpeechTrainingConfig()
    baseline: bool = Field(
        default=False, description="also train a WaveNet without codes and speakers for as many steps, to compare with"
    )
    prior: PriorStageConfig = PriorStageConfig(
        model=TransformerConfig(channels=256, layers=6, heads=4),
        training=PriorTrainingConfig(steps=20_000, batch_size=16),
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        hop = self.model.samples_per_code
        for name in ("length", "crop"):
            if (value := getattr(self.data, name)) % hop:
                raise ValueError(f"data.{name}: {value} is not divisible by 2^model.downsamplings = {hop}")
        return self


class SpeechOptions(ConfigOptions, SpeechConfig):
    """Train all stages of a speech experiment, or resume their training: the autoencoder, its baseline, the prior."""

    config_class: ClassVar[type[Config]] = SpeechConfig


@dataclass(frozen=True)
class SpeechRun:
    """A config, its run folder, and what the folder holds."""

    config: SpeechConfig
    folder: RunFolder

    @classmethod
    def existing(cls, path: Path) -> Self:
        """Return the run in a folder.

        Raises:
            UserError: If `path` is not the folder of a speech experiment.
        """
        folder = RunFolder.existing(path, "vqvae2 speech train")
        return cls(SpeechConfig.from_resolved_yaml(folder.config), folder)

    @property
    def baseline(self) -> StageFolder:
        """Folder of the WaveNet without codes."""
        return StageFolder(self.folder.path / "baseline")

    @property
    def page(self) -> Path:
        return self.folder.path / "speech.html"

    @cached_property
    def recordings(self) -> tuple[Recordings, Recordings]:
        """Recordings for training and for validation."""
        recordings, weights = open_recordings(self.config.data), self.folder.autoencoder_weights
        if weights.is_file():
            made_from = checkpoint.read_metadata(weights).get("made_from", {})
            check_made_from(made_from, {"data": recordings[0].digest()}, weights)
        return recordings

    @cached_property
    def autoencoder(self) -> SpeechAutoencoder:
        """The trained autoencoder."""
        return load_speech_autoencoder(self.folder.autoencoder_weights)

    def store(self, split: str) -> CodeStore:
        """Return the finished code store of a split."""
        store, weights = CodeStore.open(self.folder.code_store(split)), self.folder.autoencoder_weights
        if store.header.autoencoder != files.digest(weights):
            raise UserError(f"{store.path}: codes of another autoencoder than {weights}. {_FIX}")
        return store

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of the prior. Those of a speaker follow each other, in equal number."""
        return self.store("train").header.classes

    @property
    def classes_per_speaker(self) -> int:
        return len(self.classes) // len(self.autoencoder.speakers)

    @cached_property
    def prior(self) -> Prior:
        """The trained prior of the codes."""
        path, weights = self.folder.prior_weights("top"), self.folder.autoencoder_weights
        prior = load_prior(path)
        if prior.made_from.get("autoencoder") != self.autoencoder.digest:
            raise UserError(f"{path}: trained on codes of another autoencoder than {weights}. {_FIX}")
        return prior

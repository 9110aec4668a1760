"""Settings of a speech experiment and its run folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

from sampling.report.audio_page import write_audio, write_audio_page
from sampling.run_config import BaseRunConfig, PriorStageConfig
from sampling.run_data import check_run_codes, open_run_codes
from train.checkpoints import check_made_from
from train.run import BaseRun, ConfigOptions, load_run_prior
from vqvae2 import checkpoint
from vqvae2.config import Config
from vqvae2.data.code_store import CodeStore
from vqvae2.data.recordings import Recordings, RecordingsConfig, open_recordings
from vqvae2.models.speech_autoencoder import SpeechAutoencoder, SpeechModelConfig, load_speech_autoencoder
from vqvae2.priors import Prior, TransformerConfig
from vqvae2.run_folder import StageFolder
from vqvae2.training_config import PriorTrainingConfig, QuantizedTrainingConfig

_SECTIONS = {"Conversions": "conversions", "Samples": "samples"}  # of the run's page: heading → folder


class SpeechTrainingConfig(QuantizedTrainingConfig):
    """How the autoencoder is trained."""

    steps: int = Field(default=100_000, ge=1, le=2**40, description="optimizer steps")
    batch_size: int = Field(default=8, ge=1, le=2**24, description="global batch size")
    unquantized_steps: int = Field(default=300, ge=0, description="first steps not quantized, at most a tenth of all")
    spectrum_weight: float = Field(
        default=1.0,
        ge=0,
        description="weight of the error of a log-mel spectrogram predicted from the codes and the speaker; 0 removes "
        "this term, which the paper does not have",
    )


class SpeechConfig(BaseRunConfig):
    """The sections of a speech experiment's YAML file."""

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
class SpeechRun(BaseRun):
    """A config, its run folder, and what the folder holds."""

    config: SpeechConfig

    config_class: ClassVar[type[Config]] = SpeechConfig
    command: ClassVar[str] = "vqvae2 speech train"

    @property
    def baseline(self) -> StageFolder:
        """Folder of the WaveNet without codes."""
        return StageFolder(self.folder.path / "baseline")

    @cached_property
    def recordings(self) -> tuple[Recordings, Recordings]:
        """Recordings for training and for validation."""
        recordings, weights = open_recordings(self.config.data), self.folder.autoencoder_weights
        if weights.is_file():
            made_from = checkpoint.read_metadata(weights).get("made_from", {})
            check_made_from(made_from, {"data": recordings[0].digest()}, weights)
        digests = {"train": recordings[0].digest(), "val": recordings[1].digest()}
        check_run_codes(self.folder, digests, self.command)
        return recordings

    @cached_property
    def autoencoder(self) -> SpeechAutoencoder:
        """The trained autoencoder."""
        return load_speech_autoencoder(self.folder.autoencoder_weights)

    def store(self, split: str) -> CodeStore:
        """Return the finished code store of a split."""
        return open_run_codes(self.folder, split, self.command)

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
        return load_run_prior(self.folder.prior_weights("top"), self.autoencoder.digest)

    def write_audio(
        self,
        section: str,
        rows: Sequence[tuple[str, Sequence[tuple[str, Tensor]]]],
        seed: int,
        temperature: float,
        networks: Sequence[str | None],
    ) -> None:
        """Write audio files to a new folder of a section of the run's page, and the page. See `write_audio`."""
        path, page = self.folder.path, self.folder.path / "speech.html"
        folder = write_audio(path / _SECTIONS[section], rows, self.config.data.sample_rate, seed, temperature, networks)
        write_audio_page(page, f"Speech: {path.absolute().name}", _SECTIONS)
        print(folder, page, sep="\n")

"""Settings of a video experiment, and what its run folder holds."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field

from experiments.video.three_codes import ThreeCodesConfig
from sampling.run_config import RunConfig
from sampling.run_data import load_run_autoencoder, open_run_datasets
from train.checkpoints import check_made_from
from train.run import Run, RunOptions
from vqvae2 import files
from vqvae2.config import Config
from vqvae2.data.clips import find_clips
from vqvae2.data.code_store import CodeStore
from vqvae2.data.images import ImageDataset
from vqvae2.errors import UserError
from vqvae2.models import Autoencoder
from vqvae2.priors import Prior, load_prior
from vqvae2.run_folder import RunFolder, StageFolder


class VideoConfig(RunConfig):
    """The sections of a video experiment's YAML file: those of a run on images, and settings of clips."""

    given: int = Field(default=6, ge=1, le=64, description="frames that are given, and that the prior of a frame sees")
    blind: bool = Field(default=False, description="also train priors that do not see the actions, to compare with")
    three_codes: ThreeCodesConfig = ThreeCodesConfig()


class VideoOptions(RunOptions, VideoConfig):
    """Train the autoencoder of single frames, cache their codes, and train the priors of the next frame, or resume."""

    config_class: ClassVar[type[Config]] = VideoConfig


@dataclass(frozen=True)
class VideoRun(Run):
    """A config, its run folder, and what the folder holds."""

    config: VideoConfig

    @classmethod
    def existing(cls, path: Path) -> Self:
        """Return the run in a folder.

        Raises:
            UserError: If `path` is not the folder of a video experiment.
        """
        folder = RunFolder.existing(path, "vqvae2 video train")
        files.lock_folder(path)
        return cls(VideoConfig.from_resolved_yaml(folder.config), folder)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The trained autoencoder of frames."""
        return load_run_autoencoder(self.config, self.folder)

    @cached_property
    def frames(self) -> tuple[ImageDataset, ImageDataset]:
        """Frames for training and for validation, in the order of the code stores."""
        return open_run_datasets(self.config.data, self.folder)

    @cached_property
    def stores(self) -> tuple[CodeStore, CodeStore]:
        """Codes of the frames for training and for validation."""
        stores = [CodeStore.open(self.folder.code_store(split)) for split in ("train", "val")]
        for store in stores:
            store.header.check_autoencoder(self.autoencoder.digest, store.path)
        return stores[0], stores[1]

    def held_out_clips(self, length: int) -> list[range]:
        """Return the records of the first frames of each held-out clip that has at least `length` frames.

        Raises:
            UserError: If there are none.
        """
        clips = [clip[:length] for clip in find_clips(self.stores[1]) if len(clip) >= length]
        if not clips:
            raise UserError(f"{self.folder.path}: no held-out clip has {length} frames. Predict fewer.")
        return clips

    def prior(self, level: str, blind: bool) -> StageFolder:
        """Return the folder of a prior; `blind` is the one that does not see the actions."""
        return self.folder.prior(f"{level}-blind" if blind else level)

    @property
    def three_codes(self) -> StageFolder:
        return StageFolder(self.folder.path / "three-codes")

    def priors(self, blind: bool = False) -> list[Prior]:
        """Return the trained priors of all levels, finest first."""
        paths = [self.prior(level, blind).weights for level in self.config.levels]
        priors = [load_prior(path) for path in paths]
        for prior, path in zip(priors, paths, strict=True):
            check_made_from(prior.made_from, {"autoencoder": self.autoencoder.digest}, path)
        return priors

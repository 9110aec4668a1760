"""Settings of a video experiment, and what its run folder holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Int, UInt8
from pydantic import Field
from torch import Tensor

from experiments.video.three_codes import ThreeCodesConfig
from sampling.next_frames import CodeClips, FramePredictor
from sampling.params import CodeSamplingParams
from sampling.run_config import RunConfig
from sampling.run_data import load_run_autoencoder, open_run_codes, open_run_datasets
from train.run import Run, RunOptions, load_run_prior
from vqvae2.config import Config
from vqvae2.data.clips import check_clips, find_clips
from vqvae2.data.code_store import CodeStore
from vqvae2.data.images import ImageDataset
from vqvae2.data.splits import open_datasets
from vqvae2.errors import UserError
from vqvae2.models import Autoencoder
from vqvae2.run_folder import StageFolder


class VideoConfig(RunConfig):
    """The sections of a video experiment's YAML file: those of a run on images, and settings of clips."""

    context_frames: int = Field(default=6, ge=1, le=64, description="preceding frames that the prior of a frame sees")
    baseline_without_actions: bool = Field(default=False, description="also train priors that do not see the actions")
    three_codes: ThreeCodesConfig = ThreeCodesConfig()


class VideoOptions(RunOptions, VideoConfig):
    """Train the autoencoder of single frames, cache their codes, and train the priors of the next frame, or resume."""

    config_class: ClassVar[type[Config]] = VideoConfig


@dataclass(frozen=True)
class VideoRun(Run):
    """A config, its run folder, and what the folder holds."""

    config: VideoConfig

    config_class: ClassVar[type[Config]] = VideoConfig
    command: ClassVar[str] = "vqvae2 video train"

    def check(self, previous: RunConfig | None) -> None:
        if self.config.extract_codes.flip:
            raise UserError("extract_codes.flip: mirror images are not frames of a clip. Use data.flip.")
        data = self.config.data
        if data.split_by == "image" and data.val_path is None:
            raise UserError("data.split_by: `image` would take single frames out of clips. Use `folder`.")
        super().check(previous)
        if previous is None:
            check_clips(open_datasets(data))

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
        return open_run_codes(self.folder, "train"), open_run_codes(self.folder, "val")

    def held_out_clips(self, length: int) -> list[range]:
        """Return the records of the first frames of each held-out clip that has at least `length` frames.

        Raises:
            UserError: If there are none.
        """
        clips = [clip[:length] for clip in find_clips(self.stores[1]) if len(clip) >= length]
        if not clips:
            raise UserError(f"{self.folder.path}: no held-out clip has {length} frames. Predict fewer.")
        return clips

    def read_images(self, clips: Sequence[range]) -> UInt8[Tensor, "n t c h w"]:
        """Return the images of held-out frames."""
        images = self.frames[1]
        return torch.stack([torch.stack([images[record].image for record in clip]) for clip in clips])

    def read_codes(self, clips: Sequence[range]) -> CodeClips:
        """Return the codes of held-out frames."""
        codes = self.stores[1].read([record for clip in clips for record in clip]).codes
        return tuple(level.unflatten(0, (len(clips), -1)) for level in codes)

    def read_actions(self, clips: Sequence[range]) -> Int[Tensor, "n t"]:
        """Return the actions that lead to the frames after the context frames of held-out clips, −1 without actions."""
        return torch.stack([self.stores[1].read(clip[self.config.context_frames :]).label for clip in clips])

    def prior(self, level: str, with_actions: bool) -> StageFolder:
        """Return the folder of a prior that sees the actions, or of one that does not."""
        return self.folder.prior(level if with_actions else f"{level}-without-actions")

    @property
    def three_codes(self) -> StageFolder:
        return StageFolder(self.folder.path / "three-codes")

    def predictor(self, params: CodeSamplingParams, seed: int, with_actions: bool = True) -> FramePredictor:
        """Return the trained networks that predict frames."""
        paths = (self.prior(level, with_actions).weights for level in self.config.levels)
        priors = [load_run_prior(path, self.autoencoder.digest) for path in paths]
        return FramePredictor(self.autoencoder, priors, params, seed)

"""The command `vqvae2 video predict`: frames are predicted in code space, one after another, and decoded to images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from jaxtyping import Int, UInt8
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from experiments.video.video_run import VideoRun
from sampling.next_frames import CodeClips, sample_next_frames
from sampling.params import LevelSamplingParams
from vqvae2 import files
from vqvae2.command_line import Options
from vqvae2.data.images import to_uint8
from vqvae2.data.samplers import SequentialBatchSampler
from vqvae2.errors import UserError
from vqvae2.pictures import image_grid, save_animation, save_rows
from vqvae2.priors import Prior

PREDICTION = LevelSamplingParams(temperature=0.5)  # other values are compared in docs/video.md
_BATCH = 64  # clips predicted at once


class PredictOptions(Options):
    """Predict the frames that follow held-out ones, several futures of one start, and futures of other actions."""

    run: tyro.conf.Positional[Path] = Field(description="folder of a video experiment")
    count: int = Field(default=6, ge=1, le=1000, description="clips to predict")
    predicted: int = Field(default=10, ge=1, le=10**4, description="frames to predict")
    clip: int = Field(default=0, ge=0, description="clip that the other futures start from")
    futures: int = Field(default=4, ge=1, le=1000, description="futures of one start and its own actions")
    codes: LevelSamplingParams = Field(default=PREDICTION, description="sampling of the codes")
    seed: int = Field(
        default=0, ge=0, le=2**63 - 1, description="the future of a clip depends on the seed and the clip"
    )


class Predictor(NamedTuple):
    """Priors of a run, and how codes are sampled from them."""

    run: VideoRun
    priors: Sequence[Prior]  # finest first
    params: LevelSamplingParams
    seed: int

    def predict(
        self, clips: Sequence[range], actions: Int[Tensor, "n t"], futures: Sequence[int] | None = None
    ) -> UInt8[Tensor, "n t c h w"]:
        """Return the frames that follow the first frames of held-out clips, given the actions that lead to them.

        Args:
            futures: Numbers of the futures, which differ in their noise; 0 if not given.
        """
        keys = [(clip.start, future) for clip, future in zip(clips, futures or [0] * len(clips), strict=True)]
        predicted = []
        for batch in tqdm(list(SequentialBatchSampler(len(clips), _BATCH)), "predicting", leave=False):
            given = self.read([clips[index][: self.run.config.given] for index in batch])
            numbers = [keys[index] for index in batch]
            codes = sample_next_frames(self.priors, given, actions[batch], self.seed, numbers, self.params)
            predicted.append(self.decode(codes))
        return torch.cat(predicted)

    def read(self, clips: Sequence[range]) -> CodeClips:
        """Return the codes of held-out frames."""
        codes = self.run.stores[1].read([record for clip in clips for record in clip]).codes
        return tuple(level.unflatten(0, (len(clips), -1)) for level in codes)

    def decode(self, codes: CodeClips) -> UInt8[Tensor, "n t c h w"]:
        """Return images of code maps."""
        return torch.stack([to_uint8(self.run.autoencoder.decode(maps)) for maps in zip(*codes, strict=True)])


def read_clips(run: VideoRun, clips: Sequence[range]) -> UInt8[Tensor, "n t c h w"]:
    """Return the images of held-out frames."""
    images = run.frames[1]
    return torch.stack([torch.stack([images[record].image for record in clip]) for clip in clips])


def read_actions(run: VideoRun, clips: Sequence[range]) -> Int[Tensor, "n t"]:
    """Return the actions that lead to the predicted frames of held-out clips, −1 without actions."""
    return torch.stack([run.stores[1].read(clip[run.config.given :]).label for clip in clips])


def write_predictions(run: VideoRun, options: PredictOptions) -> Path:
    """Write pictures and animations to RUN/predictions, and return the folder."""
    given, classes = run.config.given, run.frames[1].classes
    clips = run.held_out_clips(given + options.predicted)
    if options.clip >= len(clips):
        raise UserError(f"--clip: {options.clip} is too large; there are {len(clips)} held-out clips, from 0.")
    predictor = Predictor(run, run.priors(), options.codes, options.seed)

    def write(name: str, rows: Mapping[str, UInt8[Tensor, "t c h w"]]) -> None:
        """Write clips as rows of a PNG, with a gap after the given frames, and side by side as a GIF."""
        gap = torch.full_like(next(iter(rows.values()))[:1], 255)
        sheet = {caption: torch.cat([clip[:given], gap, clip[given:]]) for caption, clip in rows.items()}
        save_rows(folder / f"{name}.png", sheet, enlarge_to=64)
        frames = torch.stack(list(rows.values()), 1)
        save_animation(folder / f"{name}.gif", [image_grid(each, len(rows), enlarge_to=128) for each in frames])

    def futures(clip: range, actions: Int[Tensor, "n t"], numbers: Sequence[int]) -> Tensor:
        start = read_clips(run, [clip[:given]]).expand(len(actions), -1, -1, -1, -1)
        return torch.cat([start, predictor.predict([clip] * len(actions), actions, numbers)], 1)

    folder, chosen = run.folder.path / "predictions", clips[: options.count]
    true, actions = read_clips(run, chosen), read_actions(run, chosen)
    others = [futures(clip, each[None], [0])[0] for clip, each in zip(chosen, actions, strict=True)]
    rows = [
        (f"{k} {name}", clips[k]) for k in range(len(chosen)) for name, clips in (("true", true), ("predicted", others))
    ]
    write("clips", dict(rows))
    start, count = clips[options.clip], options.futures
    several = futures(start, read_actions(run, [start]).expand(count, -1), range(count))
    write("futures", {"true": read_clips(run, [start])[0]} | {f"future {k}": clip for k, clip in enumerate(several)})
    if classes:
        constant = torch.arange(len(classes))[:, None].expand(-1, options.predicted)
        write("actions", dict(zip(classes, futures(start, constant, [0] * len(classes)), strict=True)))
    networks = [str(run.autoencoder.digest), *(str(prior.digest) for prior in predictor.priors)]
    files.write_json(folder / "manifest.json", options.to_dict() | {"run": None, "networks": networks})
    return folder


def main(options: PredictOptions) -> None:
    """Run the command `vqvae2 video predict`."""
    print(write_predictions(VideoRun.existing(options.run), options))

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
from sampling.params import LevelSamplingParams
from sampling.sample_level import Noise, sample_level
from vqvae2 import files
from vqvae2.code_maps import CodeMaps
from vqvae2.command_line import Options
from vqvae2.data.code_store import CodeStore
from vqvae2.data.images import to_uint8
from vqvae2.data.samplers import SequentialBatchSampler
from vqvae2.errors import UserError
from vqvae2.pictures import image_grid, save_animation, save_rows
from vqvae2.priors import Prior

PREDICTION = LevelSamplingParams(temperature=0.5)  # errors are lowest with little noise, see docs/video.md
_BATCH = 64  # clips predicted at once
CodeClips = tuple[Int[Tensor, "n _ _ _"], ...]  # code maps of consecutive frames (N, T, H_l, W_l), finest level first


class PredictOptions(Options):
    """Predict the frames that follow held-out ones, several futures of one start, and futures of other actions."""

    run: tyro.conf.Positional[Path] = Field(description="folder of a video experiment")
    count: int = Field(default=6, ge=1, le=1000, description="clips to predict")
    futures: int = Field(default=4, ge=1, le=1000, description="futures of each clip")
    clip: int = Field(default=0, ge=0, description="held-out clip that the futures of other actions start from")
    codes: LevelSamplingParams = Field(default=PREDICTION, description="sampling of the codes")
    seed: int = Field(
        default=0, ge=0, le=2**63 - 1, description="the future of a clip depends on the seed and the clip"
    )


class Predictor(NamedTuple):
    """The networks of a run, and how codes are sampled."""

    run: VideoRun
    frames: CodeStore  # codes of the held-out frames
    priors: Sequence[Prior]  # finest first
    params: LevelSamplingParams
    seed: int

    def predict(
        self, clips: Sequence[range], actions: Int[Tensor, "n t"], futures: Sequence[int] | None = None
    ) -> UInt8[Tensor, "n t c h w"]:
        """Return the frames that follow the first frames of clips, given the actions that lead to them.

        Args:
            futures: Numbers of the futures, which differ in their noise; 0 if not given.
        """
        keys = [(clip.start, future) for clip, future in zip(clips, futures or [0] * len(clips), strict=True)]
        predicted = []
        for batch in tqdm(list(SequentialBatchSampler(len(clips), _BATCH)), "predicting", leave=False):
            given = [record for index in batch for record in clips[index][: self.run.config.given]]
            maps = tuple(level.unflatten(0, (len(batch), -1)) for level in self.frames.read(given).codes)
            codes = self.continue_codes(maps, actions[batch], [keys[index] for index in batch])
            images = self.run.autoencoder.decode(tuple(level.flatten(0, 1) for level in codes))
            predicted.append(to_uint8(images).unflatten(0, (len(batch), -1)))
        return torch.cat(predicted)

    def continue_codes(
        self, given: CodeClips, actions: Int[Tensor, "n t"], keys: Sequence[tuple[int, ...]]
    ) -> CodeClips:
        """Return the codes of the next frames, sampled one frame after another, coarser levels first."""
        frames = [list(level.unbind(1)) for level in given]
        for step, action in enumerate(actions.unbind(1)):
            noise = [(*key, step) for key in keys]
            current: CodeMaps = ()
            for index, prior in reversed(list(enumerate(self.priors))):
                seen = (*frames[index][: -self.run.config.given - 1 : -1], *current, action[:, None, None])
                coarser = seen[: len(prior.spec.coarser)]  # without the action if the prior does not see it
                current = (sample_level(prior, Noise(self.seed, noise, index), self.params, coarser), *current)
            for level, codes in zip(frames, current, strict=True):
                level.append(codes)
        return tuple(torch.stack(level[self.run.config.given :], 1) for level in frames)


def make_predictor(run: VideoRun, params: LevelSamplingParams, seed: int, blind: bool = False) -> Predictor:
    """Return a predictor with the trained networks of a run; `blind` uses the priors that do not see the actions."""
    return Predictor(run, run.store("val"), run.priors(blind), params, seed)


def read_clips(run: VideoRun, clips: Sequence[range]) -> UInt8[Tensor, "n t c h w"]:
    """Return the images of held-out frames."""
    images = run.frames[1]
    return torch.stack([torch.stack([images[record].image for record in clip]) for clip in clips])


def read_actions(run: VideoRun, clips: Sequence[range]) -> Int[Tensor, "n t"]:
    """Return the actions that lead to the predicted frames of clips, −1 without actions."""
    records = [record for clip in clips for record in clip[run.config.given :]]
    return run.store("val").read(records).label.view(len(clips), -1)


def _write(folder: Path, name: str, given: int, rows: Mapping[str, UInt8[Tensor, "t c h w"]]) -> None:
    """Write clips as rows of a PNG, with a gap after the given frames, and as a GIF."""
    gap = {caption: torch.full_like(clip[:1], 255) for caption, clip in rows.items()}
    sheet = {caption: torch.cat([clip[:given], gap[caption], clip[given:]]) for caption, clip in rows.items()}
    save_rows(folder / f"{name}.png", sheet, enlarge_to=64)
    frames = torch.stack(list(rows.values()), 1)
    save_animation(folder / f"{name}.gif", [image_grid(each, columns=len(rows), enlarge_to=128) for each in frames])


def write_predictions(run: VideoRun, options: PredictOptions) -> Path:
    """Write pictures and animations to RUN/predictions, and return the folder."""
    folder, given, predicted = run.folder.path / "predictions", run.config.given, run.config.predicted
    clips = run.held_out_clips(given + predicted)
    if options.clip >= len(clips):
        raise UserError(f"--clip: {options.clip} is too large; there are {len(clips)} held-out clips, from 0.")
    predictor = make_predictor(run, options.codes, options.seed)
    chosen, classes = clips[: options.count], run.store("val").header.classes
    true, actions = read_clips(run, chosen), read_actions(run, chosen)
    futures = [future for _ in chosen for future in range(options.futures)]
    repeated = [clip for clip in chosen for _ in range(options.futures)]
    frames = predictor.predict(repeated, actions.repeat_interleave(options.futures, 0), futures)
    frames = frames.unflatten(0, (len(chosen), -1))

    def extend(clip: Tensor, future: Tensor) -> Tensor:
        return torch.cat([clip[:given], future])

    both = {
        f"{k} {name}": clip
        for k in range(len(chosen))
        for name, clip in (("true", true[k]), ("predicted", extend(true[k], frames[k, 0])))
    }
    _write(folder, "clips", given, both)
    several = {f"future {k}": extend(true[0], future) for k, future in enumerate(frames[0])}
    _write(folder, "futures", given, {"true": true[0], **several})
    if classes:
        start = clips[options.clip]
        constant = torch.arange(len(classes))[:, None].expand(-1, predicted)
        others = predictor.predict([start] * len(classes), constant)
        first = read_clips(run, [start])[0]
        _write(
            folder, "actions", given, {name: extend(first, each) for name, each in zip(classes, others, strict=True)}
        )
    networks = [str(run.autoencoder.digest), *(str(prior.digest) for prior in predictor.priors)]
    files.write_json(folder / "manifest.json", {"networks": networks, **options.to_dict(), "run": None})
    return folder


def main(options: PredictOptions) -> None:
    """Run the command `vqvae2 video predict`."""
    print(write_predictions(VideoRun.existing(options.run), options))

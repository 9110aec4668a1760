"""The command `vqvae2 video predict`: frames are predicted in code space, one after another, and decoded to images."""

from collections.abc import Sequence
from pathlib import Path

import torch
import tyro
from jaxtyping import Int, UInt8
from pydantic import Field
from torch import Tensor

from experiments.video.video_run import VideoRun
from sampling.params import CodeSamplingParams
from sampling.processes import on_main_process
from vqvae2 import files
from vqvae2.command_line import Options
from vqvae2.errors import UserError
from vqvae2.pictures import save_clips

PREDICTION = CodeSamplingParams(temperature=0.5)  # other values are compared in docs/video.md


class PredictOptions(Options):
    """Predict the frames that follow held-out ones, several futures of one start, and futures of other actions."""

    run: tyro.conf.Positional[Path] = Field(description="folder of a video experiment")
    count: int = Field(default=6, ge=1, le=1000, description="clips to predict")
    num_frames: int = Field(default=10, ge=1, le=10**4, description="frames to predict after the context frames")
    clip: int = Field(default=0, ge=0, description="clip that the other futures start from")
    futures: int = Field(default=4, ge=1, le=1000, description="futures of one start and its own actions")
    codes: CodeSamplingParams = Field(default=PREDICTION, description="sampling of the codes")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="the noise of a clip depends on the seed and the clip")


def write_predictions(run: VideoRun, options: PredictOptions) -> None:
    """Write pictures and animations to RUN/predictions, and print the folder."""
    context, classes = run.config.context_frames, run.frames[1].classes
    clips = run.held_out_clips(context + options.num_frames)
    if options.clip >= len(clips):
        raise UserError(f"--clip: {options.clip} is too large; there are {len(clips)} held-out clips, from 0.")
    predictor = run.predictor(options.codes, options.seed)

    def futures(clip: range, actions: Int[Tensor, "n t"], numbers: Sequence[int]) -> UInt8[Tensor, "n t c h w"]:
        """Return the context frames of a clip with a future for each row of actions. Numbers select the noise."""
        start = [clip[:context]] * len(actions)
        predicted = predictor.predict(run.read_codes(start), actions, [(clip.start, number) for number in numbers])
        return torch.cat([run.read_images(start), predicted], 1)

    folder, chosen = run.folder.path / "predictions", clips[: options.count]
    true, actions = run.read_images(chosen), run.read_actions(chosen)
    rows = {}
    for k, clip in enumerate(chosen):
        rows |= {f"{k} true": true[k], f"{k} predicted": futures(clip, actions[k : k + 1], [0])[0]}
    save_clips(folder, "clips", rows, context)
    start, count = clips[options.clip], options.futures
    several = futures(start, run.read_actions([start]).expand(count, -1), range(count))
    rows = {"true": run.read_images([start])[0]} | {f"future {k}": clip for k, clip in enumerate(several)}
    save_clips(folder, "futures", rows, context)
    if classes:
        constant = torch.arange(len(classes))[:, None].expand(-1, options.num_frames)
        others = futures(start, constant, [0] * len(classes))
        save_clips(folder, "actions", dict(zip(classes, others, strict=True)), context)
    networks = [str(network.digest) for network in (run.autoencoder, *predictor.priors)]
    files.write_json(folder / "manifest.json", options.to_dict() | {"run": None, "networks": networks})
    print(folder)


def main(options: PredictOptions) -> None:
    """Run the command `vqvae2 video predict`."""
    on_main_process(write_predictions, VideoRun.existing(options.run), options)

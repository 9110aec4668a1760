"""The command `vqvae2 video train`: all stages, of which the priors are those of the next frame."""

from pathlib import Path

from experiments.video.video_run import VideoConfig, VideoOptions, VideoRun
from sampling.params import LevelSamplingParams
from sampling.sample_level import Noise, sample_level
from train.accelerator import to_device
from train.loop import train
from train.run import is_finished, open_run
from train.stages.autoencoder import train_autoencoder
from train.stages.extract_codes import extract_codes
from train.stages.prior import PriorStage
from vqvae2 import files
from vqvae2.data.clips import FrameHistories
from vqvae2.data.images import to_uint8
from vqvae2.errors import UserError
from vqvae2.pictures import interleave_rows, save_grid

_PREVIEW_FRAMES = 8


class FramePriorStage(PriorStage):
    """Training of the prior of one level of the next frame."""

    def __init__(self, run: VideoRun, level: str, blind: bool) -> None:
        self.run, self.index = run, run.config.levels.index(level)
        with_actions = bool(run.stores[0].header.classes) and not blind
        training, held_out = (FrameHistories(each, self.index, run.config.given, with_actions) for each in run.stores)
        made_from = {"autoencoder": run.autoencoder.digest}
        super().__init__(
            (f"{level}-blind" if blind else level, 0), training, held_out, run.config.priors[level], made_from
        )

    def preview(self, path: Path) -> None:
        """Write held-out frames, each above the same frame sampled given what the prior sees."""
        data = self.validation_data
        chosen = range(0, len(data), max(1, len(data) // _PREVIEW_FRAMES))[:_PREVIEW_FRAMES]
        frame, *coarser = data.read(chosen).codes
        device = next(self.network.parameters()).device
        noise = Noise(0, chosen, self.index)
        sampled = sample_level(self.network, noise, LevelSamplingParams(), to_device(tuple(coarser), device)).cpu()
        specs, shown = self.run.autoencoder.map_specs, self.run.config.levels[self.index :]
        finer = [frame.new_zeros(len(frame), *spec.shape) for spec in specs[: self.index]]
        above = coarser[self.run.config.given :][: len(shown) - 1]
        rows = (to_uint8(self.run.autoencoder.decode((*finer, each, *above), shown)) for each in (frame, sampled))
        save_grid(path, *interleave_rows(*rows, columns=_PREVIEW_FRAMES))


def train_video(run: VideoRun) -> None:
    """Train all stages of a run. Finished ones are skipped."""
    train_autoencoder(run)
    extract_codes(run)
    made_from = {"autoencoder": files.digest(run.folder.autoencoder_weights)}
    for blind in (False, True) if run.config.blind else (False,):
        for level in reversed(run.config.levels):
            folder = run.prior(level, blind)
            if not is_finished(folder.weights, made_from):
                stage = FramePriorStage(run, level, blind)
                train(stage, stage.config.training, folder.path, run.config.data.num_workers, run.config.tracker)


def main(options: VideoOptions) -> None:
    """Run the command `vqvae2 video train`."""
    if options.resume_with_changes and options.blind:
        raise UserError("--resume-with-changes: would change only one of two priors that are compared. Use --no-blind.")
    run = open_run(options)
    assert isinstance(run.config, VideoConfig)
    train_video(VideoRun(run.config, run.folder))

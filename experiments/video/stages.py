"""The command `vqvae2 video train`: all stages, of which the priors are those of the next frame."""

from experiments.video.video_run import VideoOptions, VideoRun
from train.loop import train
from train.run import is_finished
from train.stages.autoencoder import train_autoencoder
from train.stages.extract_codes import extract_codes
from train.stages.frame_prior import FramePriorStage
from vqvae2 import files
from vqvae2.errors import UserError


def train_video(run: VideoRun) -> None:
    """Train all stages of a run. Finished ones are skipped."""
    train_autoencoder(run)
    extract_codes(run)
    config, made_from = run.config, {"autoencoder": files.digest(run.folder.autoencoder_weights)}
    for with_actions in (True, False) if config.baseline_without_actions else (True,):
        for level in reversed(config.levels):
            folder, settings = run.prior(level, with_actions), config.priors[level]
            if not is_finished(folder.weights, made_from):
                seen = config.context_frames, with_actions
                stage = FramePriorStage(level, run.autoencoder, run.stores, settings, *seen)
                train(stage, settings.training, folder.path, config.data.num_workers, config.tracker)


def main(options: VideoOptions) -> None:
    """Run the command `vqvae2 video train`."""
    if options.resume_with_changes and options.baseline_without_actions:
        raise UserError("--resume-with-changes: would leave the baseline as it is. Use --no-baseline-without-actions.")
    train_video(VideoRun.open(options, options.resume_with_changes))

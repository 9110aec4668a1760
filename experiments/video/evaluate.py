"""The command `vqvae2 video evaluate`: errors of predicted frames, and whether actions have their effect."""

from pathlib import Path

import torch
import tyro
from pydantic import Field

from experiments.video.predict import PREDICTION
from experiments.video.video_run import VideoRun
from sampling.evaluation.action_recognition import ActionRecognizer
from sampling.next_frames import decode_clips
from sampling.params import CodeSamplingParams
from sampling.processes import processes
from vqvae2 import files
from vqvae2.command_line import Options
from vqvae2.data.clips import find_clips
from vqvae2.data.images import to_float
from vqvae2.metrics.reconstruction import compare_images


class EvaluateVideoOptions(Options):
    """Measure predictions of held-out clips, and write RUN/evaluation/metrics.json."""

    run: tyro.conf.Positional[Path] = Field(description="folder of a video experiment")
    count: int = Field(default=1000, ge=1, le=10**6, description="clips; all held-out ones if there are fewer")
    num_frames: int = Field(default=10, ge=1, le=10**4, description="frames to predict after the context frames")
    codes: CodeSamplingParams = Field(default=PREDICTION, description="sampling of the codes")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="seed of the predictions")
    classifier_steps: int = Field(default=1000, ge=1, le=10**6, description="training steps of the action classifier")


def evaluate(run: VideoRun, options: EvaluateVideoOptions) -> dict[str, dict[str, list[float]]]:
    """Return the mean MSE and SSIM of each predicted frame of held-out clips, and the fractions of recognized actions.

    Predictions are compared with those of priors that do not see the actions, with the last context frame, and with the
    reconstructions of the true frames, whose error predictions in code space can hardly reach.
    """
    context = run.config.context_frames
    clips = run.held_out_clips(context + options.num_frames)[: options.count]
    frames, actions = run.read_images(clips), run.read_actions(clips)
    start, true = frames[:, :context], frames[:, context:]
    predictor, numbers = run.predictor(options.codes, options.seed), [(clip.start, 0) for clip in clips]
    seen = run.read_codes([clip[:context] for clip in clips])
    sets = {
        "prediction": predictor.predict(seen, actions, numbers),
        "last frame": start[:, -1:].expand_as(true),
        "reconstruction": decode_clips(run.autoencoder, run.read_codes([clip[context:] for clip in clips])),
    }
    if run.config.baseline_without_actions:
        baseline = run.predictor(options.codes, options.seed, with_actions=False)
        sets["without actions"] = baseline.predict(seen, actions, numbers)
    metrics: dict[str, dict[str, list[float]]] = {"mse": {}, "ssim": {}, "recognized": {}}
    for name, images in sets.items():
        errors = [compare_images(*map(to_float, pair)) for pair in zip(true.unbind(1), images.unbind(1), strict=True)]
        metrics["mse"][name], metrics["ssim"][name] = [each.mse for each in errors], [each.ssim for each in errors]
    if run.frames[0].classes:
        recognizer = ActionRecognizer(run.frames[0], find_clips(run.stores[0]), options.classifier_steps)
        others = actions.roll(1, 0)  # of another clip
        sets |= {"real": true, "other actions": predictor.predict(seen, others, numbers)}
        for name in ("real", "reconstruction", "prediction", "other actions"):
            intended = others if name == "other actions" else actions
            metrics["recognized"][name] = recognizer.accuracy(torch.cat([start[:, -1:], sets[name]], 1), intended)
    return metrics


def main(options: EvaluateVideoOptions) -> None:
    """Run the command `vqvae2 video evaluate`."""
    run = VideoRun.existing(options.run)
    if not processes().is_main_process:
        return
    metrics = evaluate(run, options)
    files.write_json(run.folder.metrics, {"options": options.to_dict() | {"run": None}, **metrics})
    for kind, named in metrics.items():
        for name, values in named.items():
            print(f"{f'{kind}, {name}:':<28} {' '.join(f'{value:.4f}' for value in values)}")
    print(run.folder.metrics)

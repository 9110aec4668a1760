"""The command `vqvae2 video evaluate`: errors of predicted frames, and whether actions have their effect."""

from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn

from experiments.video.predict import PREDICTION, Predictor, read_actions, read_clips
from experiments.video.video_run import VideoRun
from sampling.params import LevelSamplingParams
from vqvae2 import files
from vqvae2.command_line import Options
from vqvae2.data.clips import find_clips
from vqvae2.data.images import to_float
from vqvae2.metrics.reconstruction import ReconstructionStatistics
from vqvae2.models.blocks import make_encoder

_CHANNELS, _SIDE, _BATCH, _LEARNING_RATE = 32, 4, 64, 2e-3  # of the classifier of actions


class EvaluateVideoOptions(Options):
    """Measure predictions of held-out clips, and write RUN/evaluation/metrics.json."""

    run: tyro.conf.Positional[Path] = Field(description="folder of a video experiment")
    count: int = Field(default=1000, ge=1, le=10**6, description="clips; all held-out ones if there are fewer")
    predicted: int = Field(default=10, ge=1, le=10**4, description="frames to predict")
    codes: LevelSamplingParams = Field(default=PREDICTION, description="sampling of the codes")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="seed of the predictions")
    classifier_steps: int = Field(default=1000, ge=1, le=10**6, description="training steps of the action classifier")


def evaluate(run: VideoRun, options: EvaluateVideoOptions) -> dict[str, dict[str, list[float]]]:
    """Return the mean MSE and SSIM of each predicted frame of held-out clips, and the fractions of recognized actions.

    Predictions are compared with those of priors that do not see the actions, with the last given frame, and with the
    reconstructions of the true frames, whose error predictions in code space can hardly reach.
    """
    given = run.config.given
    clips = run.held_out_clips(given + options.predicted)[: options.count]
    frames, actions = read_clips(run, clips), read_actions(run, clips)
    start, true = frames[:, :given], frames[:, given:]
    predictor = Predictor(run, run.priors(), options.codes, options.seed)
    sets = {
        "prediction": predictor.predict(clips, actions),
        "last frame": start[:, -1:].expand_as(true),
        "reconstruction": predictor.decode(predictor.read([clip[given:] for clip in clips])),
    }
    if run.config.blind:
        sets["blind"] = predictor._replace(priors=run.priors(blind=True)).predict(clips, actions)
    metrics: dict[str, dict[str, list[float]]] = {"mse": {}, "ssim": {}, "recognized": {}}
    for name, images in sets.items():
        metrics["mse"][name], metrics["ssim"][name] = _errors(true, images)
    if run.frames[0].classes:
        classifier, others = train_classifier(run, options.classifier_steps), actions.roll(1, 0)  # of another clip
        sets |= {"real": true, "other actions": predictor.predict(clips, others)}
        for name in ("real", "reconstruction", "prediction", "other actions"):
            intended = others if name == "other actions" else actions
            metrics["recognized"][name] = _recognized(classifier, torch.cat([start[:, -1:], sets[name]], 1), intended)
    return metrics


def train_classifier(run: VideoRun, steps: int) -> nn.Module:
    """Train a classifier of the action between two real frames, from their `_pairs`."""
    torch.manual_seed(0)
    frames, size = run.frames[0], _CHANNELS * _SIDE**2
    encoder = make_encoder(2 * frames.config.channels, _CHANNELS, 16, _CHANNELS, 1)
    head = nn.AdaptiveAvgPool2d(_SIDE), nn.Flatten(), nn.Linear(size, len(frames.classes))
    network = nn.Sequential(encoder, *head)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    later = torch.tensor([record for clip in find_clips(run.stores[0]) for record in clip[1:]])
    for _ in range(steps):
        chosen = later[torch.randint(len(later), (_BATCH,))].tolist()
        before, after = (torch.stack([frames[record - lag].image for record in chosen]) for lag in (1, 0))
        labels = torch.tensor([frames.label(record) for record in chosen])
        F.cross_entropy(network(_pairs(before, after)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return network.eval()


def _pairs(before: UInt8[Tensor, "n c h w"], after: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h w"]:
    return to_float(torch.cat([before, after], 1))


@torch.inference_mode()
def _recognized(classifier: nn.Module, clips: UInt8[Tensor, "n t c h w"], actions: Int[Tensor, "n s"]) -> list[float]:
    """Return the fraction of recognized actions, each of which leads from a frame to the next one, at each step."""
    found = [classifier(_pairs(clips[:, t], clips[:, t + 1])).argmax(1) for t in range(actions.shape[1])]
    return (torch.stack(found, 1) == actions).double().mean(0).tolist()


def _errors(true: UInt8[Tensor, "n t c h w"], others: UInt8[Tensor, "n t c h w"]) -> tuple[list[float], list[float]]:
    """Return the mean MSE and the mean SSIM of each frame."""
    found = []
    for pair in zip(true.unbind(1), others.unbind(1), strict=True):
        statistics = ReconstructionStatistics()
        statistics.update(*map(to_float, pair))
        found.append(statistics.compute())
    return [each.mse for each in found], [each.ssim for each in found]


def main(options: EvaluateVideoOptions) -> None:
    """Run the command `vqvae2 video evaluate`."""
    run = VideoRun.existing(options.run)
    metrics = evaluate(run, options)
    files.write_json(run.folder.metrics, {"options": options.to_dict() | {"run": None}, **metrics})
    for kind, named in metrics.items():
        for name, values in named.items():
            print(f"{f'{kind}, {name}:':<28} {' '.join(f'{value:.4f}' for value in values)}")
    print(run.folder.metrics)

"""The command `vqvae2 video evaluate`: errors of predicted frames, and whether actions have their effect."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn

from experiments.video.clips import find_clips
from experiments.video.predict import PREDICTION, make_predictor, read_actions, read_clips
from experiments.video.video_run import VideoRun
from sampling.params import LevelSamplingParams
from vqvae2 import files
from vqvae2.command_line import Options
from vqvae2.config import Config, Measured
from vqvae2.data.images import ImageDataset, to_float, to_uint8
from vqvae2.metrics.reconstruction import ReconstructionStatistics
from vqvae2.models.blocks import make_encoder

_CHANNELS, _STRIDE, _BATCH, _LEARNING_RATE = 32, 16, 64, 2e-3  # of the classifier of actions


class EvaluateVideoOptions(Options):
    """Measure predictions of held-out clips, and write RUN/evaluation/metrics.json."""

    run: tyro.conf.Positional[Path] = Field(description="folder of a video experiment")
    count: int = Field(default=1000, ge=1, le=10**6, description="clips, at most; all held-out ones if there are fewer")
    codes: LevelSamplingParams = Field(default=PREDICTION, description="sampling of the codes")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="seed of the predictions")
    classifier_steps: int = Field(default=1000, ge=1, le=10**6, description="training steps of the action classifier")


class VideoMetrics(Config):
    """Contents of metrics.json. Errors are means of each predicted frame, the first one first."""

    clips: int
    codes: LevelSamplingParams
    seed: int
    mse: dict[str, list[Measured]]  # of images scaled to [0, 1]
    ssim: dict[str, list[Measured]]
    actions_recognized: dict[str, Measured]  # fractions of the predicted frames; empty without actions

    def lines(self) -> list[str]:
        """Return the metrics as text."""
        errors = [
            f"{f'{metric} {name}':<18} {' '.join(f'{value:.4f}' for value in values)}"
            for metric, named in (("MSE", self.mse), ("SSIM", self.ssim))
            for name, values in named.items()
        ]
        return [*errors, *(f"actions of {name:<10} {value:.3f}" for name, value in self.actions_recognized.items())]


class ActionClassifier(nn.Sequential):
    """Network from two consecutive frames (B, 2C, H, W) in [-1, 1] to the logits of the action between them."""

    def __init__(self, channels: int, shape: tuple[int, int], actions: int) -> None:
        size = _CHANNELS * (shape[0] // _STRIDE) * (shape[1] // _STRIDE)
        encoder = make_encoder(2 * channels, _CHANNELS, _STRIDE, _CHANNELS, 1)
        super().__init__(encoder, nn.Flatten(), nn.Linear(size, actions))

    @torch.inference_mode()
    def accuracy(self, clips: UInt8[Tensor, "n t c h w"], actions: Int[Tensor, "n s"]) -> float:
        """Return how many of the actions that lead to the last frames of clips are recognized, as a fraction."""
        steps = actions.shape[1]
        found = [
            self(pair_frames(clips[:, frame - 1], clips[:, frame])).argmax(1) == actions[:, frame - len(clips[0])]
            for frame in range(clips.shape[1] - steps, clips.shape[1])
        ]
        return float(torch.stack(found).double().mean())


def pair_frames(before: UInt8[Tensor, "n c h w"], after: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h w"]:
    """Return the input of the classifier."""
    return to_float(torch.cat([before, after], 1))


def train_classifier(frames: ImageDataset, clips: Sequence[range], steps: int) -> ActionClassifier:
    """Train a classifier of actions on pairs of real frames."""
    torch.manual_seed(0)
    network = ActionClassifier(frames.config.channels, frames.config.shape, len(frames.classes))
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    later = torch.tensor([record for clip in clips for record in clip[1:]])
    for _ in range(steps):
        chosen = later[torch.randint(len(later), (_BATCH,))].tolist()
        before, after = (torch.stack([frames[k - offset].image for k in chosen]) for offset in (1, 0))
        labels = torch.tensor([frames.label(k) for k in chosen])
        F.cross_entropy(network(pair_frames(before, after)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return network.eval()


def errors(true: UInt8[Tensor, "n t c h w"], predicted: UInt8[Tensor, "n t c h w"]) -> tuple[list[float], list[float]]:
    """Return the mean MSE and the mean SSIM of each predicted frame."""
    found = []
    for one, other in zip(true.unbind(1), predicted.unbind(1), strict=True):
        statistics = ReconstructionStatistics()
        statistics.update(to_float(one), to_float(other))
        found.append(statistics.compute())
    return [each.mse for each in found], [each.ssim for each in found]


def evaluate(run: VideoRun, options: EvaluateVideoOptions) -> VideoMetrics:
    """Measure a run on held-out clips.

    Predictions are compared with those of priors that do not see the actions, with the last given frame, and with the
    reconstructions of the true frames, whose error no prediction in code space can be expected to reach.
    """
    given, predicted = run.config.given, run.config.predicted
    clips = run.held_out_clips(given + predicted)[: options.count]
    frames, actions = read_clips(run, clips), read_actions(run, clips)
    start, true = frames[:, :given], frames[:, given:]
    predictor = make_predictor(run, options.codes, options.seed)
    codes = predictor.frames.read([record for clip in clips for record in clip[given:]]).codes
    reconstructed = torch.cat(
        [to_uint8(run.autoencoder.decode(part)) for part in zip(*(c.split(256) for c in codes), strict=True)]
    )
    sets = {
        "prediction": predictor.predict(clips, actions),
        "last frame": start[:, -1:].expand_as(true),
        "reconstruction": reconstructed.view_as(true),
    }
    if run.config.blind:
        sets["blind"] = make_predictor(run, options.codes, options.seed, blind=True).predict(clips, actions)
    found = {name: errors(true, images) for name, images in sets.items()}
    recognized = {}
    if run.frames[0].classes:
        classifier = train_classifier(run.frames[0], find_clips(run.store("train")), options.classifier_steps)
        others = actions.roll(1, 0)  # of another clip
        sets["other actions"] = predictor.predict(clips, others)
        recognized = {"real": classifier.accuracy(frames, actions)}
        for name, intended in (("reconstruction", actions), ("prediction", actions), ("other actions", others)):
            recognized[name] = classifier.accuracy(torch.cat([start, sets[name]], 1), intended)
    return VideoMetrics(
        clips=len(clips),
        codes=options.codes,
        seed=options.seed,
        mse={name: mse for name, (mse, _) in found.items()},
        ssim={name: ssim for name, (_, ssim) in found.items()},
        actions_recognized=recognized,
    )


def main(options: EvaluateVideoOptions) -> None:
    """Run the command `vqvae2 video evaluate`."""
    run = VideoRun.existing(options.run)
    metrics = evaluate(run, options)
    files.write_json(run.folder.metrics, metrics.to_dict())
    print("\n".join([*metrics.lines(), str(run.folder.metrics)]))

"""Recognition of the action between two frames, by a convolutional network trained on real clips."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from vqvae2.data.images import ImageDataset, to_float
from vqvae2.models.blocks import make_encoder

_CHANNELS, _SIDE, _BATCH, _LEARNING_RATE = 32, 4, 64, 2e-3


class ActionRecognizer:
    """A classifier of the action that leads from a frame to the next one, trained when it is constructed.

    Args:
        frames: Frames whose labels are the actions that lead to them.
        clips: Indices of the frames of each clip.
        steps: Training steps.
    """

    def __init__(self, frames: ImageDataset, clips: Sequence[range], steps: int) -> None:
        torch.manual_seed(0)
        encoder = make_encoder(2 * frames.config.channels, _CHANNELS, 16, _CHANNELS, 1)
        head = nn.Linear(_CHANNELS * _SIDE**2, len(frames.classes))
        self.network = nn.Sequential(encoder, nn.AdaptiveAvgPool2d(_SIDE), nn.Flatten(), head)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        later = torch.tensor([index for clip in clips for index in clip[1:]])
        for _ in range(steps):
            chosen = later[torch.randint(len(later), (_BATCH,))].tolist()
            before, after = (torch.stack([frames[index - lag].image for index in chosen]) for lag in (1, 0))
            labels = torch.tensor([frames.label(index) for index in chosen])
            F.cross_entropy(self._logits(before, after), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        self.network.eval()

    @torch.inference_mode()
    def accuracy(self, clips: UInt8[Tensor, "n t c h w"], actions: Int[Tensor, "n s"]) -> list[float]:
        """Return the fraction of recognized actions, each of which leads from a frame to the next one, at each step."""
        found = [self._logits(clips[:, t], clips[:, t + 1]).argmax(1) for t in range(actions.shape[1])]
        return (torch.stack(found, 1) == actions).double().mean(0).tolist()

    def _logits(self, before: UInt8[Tensor, "n c h w"], after: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.network(to_float(torch.cat([before, after], 1)))

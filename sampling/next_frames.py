"""Sample the next frames of clips: codes, one frame after another, and the images of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from tqdm import tqdm

from sampling.params import CodeSamplingParams
from sampling.sample_level import Noise, sample_level
from vqvae2.code_maps import CodeMaps
from vqvae2.data.images import to_uint8
from vqvae2.data.samplers import SequentialBatchSampler
from vqvae2.models import Autoencoder
from vqvae2.priors import Prior

CodeClips = tuple[Int[Tensor, "n _ _ _"], ...]  # code maps of consecutive frames (N, T, H_l, W_l), finest level first
_BATCH = 64  # clips predicted at once


class FramePredictor(NamedTuple):
    """Networks that predict frames, and how codes are sampled from them."""

    autoencoder: Autoencoder
    priors: Sequence[Prior]  # finest first
    params: CodeSamplingParams
    seed: int

    def predict(
        self, context: CodeClips, actions: Int[Tensor, "n t"], clips: Sequence[tuple[int, ...]]
    ) -> UInt8[Tensor, "n t c h w"]:
        """Return the images of the frames after the context frames. See `sample_next_frames`."""
        predicted = []
        for batch in tqdm(list(SequentialBatchSampler(len(clips), _BATCH)), "predicting", leave=False):
            start, numbers = tuple(level[batch] for level in context), [clips[index] for index in batch]
            codes = sample_next_frames(self.priors, start, actions[batch], self.seed, numbers, self.params)
            predicted.append(decode_clips(self.autoencoder, codes))
        return torch.cat(predicted)


def decode_clips(autoencoder: Autoencoder, codes: CodeClips) -> UInt8[Tensor, "n t c h w"]:
    """Return the images of the frames of clips."""
    return torch.stack([to_uint8(autoencoder.decode(maps)) for maps in zip(*codes, strict=True)])


def sample_next_frames(
    priors: Sequence[Prior],
    context: CodeClips,
    actions: Int[Tensor, "n t"],
    seed: int,
    clips: Sequence[tuple[int, ...]],
    params: CodeSamplingParams,
) -> CodeClips:
    """Return the codes of the frames after the context frames, as many as there are actions.

    Args:
        priors: Priors trained on `vqvae2.data.clips.FrameHistories`, finest level first.
        actions: The action that leads to each frame; ignored by priors that do not see it.
        clips: Numbers of each clip, on which its noise depends.
    """
    count, frames = context[0].shape[1], [list(level.unbind(1)) for level in context]
    for step, action in enumerate(actions.unbind(1)):
        keys = [(*clip, step) for clip in clips]
        current: CodeMaps = ()
        for index, prior in reversed(list(enumerate(priors))):
            seen = (*reversed(frames[index][-count:]), *current, action[:, None, None])
            coarser = seen[: len(prior.spec.coarser)]  # without the action if the prior does not see it
            current = (sample_level(prior, Noise(seed, keys, index), params, coarser), *current)
        for level, codes in zip(frames, current, strict=True):
            level.append(codes)
    return tuple(torch.stack(level[count:], 1) for level in frames)

"""Sample the codes of the next frames of clips, one frame after another."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from sampling.params import LevelSamplingParams
from sampling.sample_level import Noise, sample_level
from vqvae2.code_maps import CodeMaps
from vqvae2.priors import Prior

CodeClips = tuple[Int[Tensor, "n _ _ _"], ...]  # code maps of consecutive frames (N, T, H_l, W_l), finest level first


def sample_next_frames(
    priors: Sequence[Prior],
    given: CodeClips,
    actions: Int[Tensor, "n t"],
    seed: int,
    clips: Sequence[tuple[int, ...]],
    params: LevelSamplingParams,
) -> CodeClips:
    """Return the codes of the frames after the given ones, as many as there are actions.

    Args:
        priors: Priors trained on `vqvae2.data.clips.FrameHistories`, finest level first.
        actions: The action that leads to each frame; ignored by priors that do not see it.
        clips: Numbers of each clip, on which its noise depends.
    """
    count, frames = given[0].shape[1], [list(level.unbind(1)) for level in given]
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

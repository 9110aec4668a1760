"""Clips in a code store of frames, and the codes that the prior of a frame sees."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from vqvae2.code_maps import MapSpec
from vqvae2.data.code_store import CodeBatch, CodeStore
from vqvae2.errors import UserError


def find_clips(frames: CodeStore) -> list[range]:
    """Return the records of each clip. The frames of a clip are the images of one folder, in the order of their names.

    Raises:
        UserError: If frames are missing, because their images could not be read.
    """
    if frames.header.unreadable:
        name = frames.path
        raise UserError(f"{name}: {len(frames.header.unreadable)} frames are unreadable. Replace them, or their clips.")
    folders = [frames.image_name(index).rpartition("/")[0] for index in range(len(frames))]
    starts = [index for index in range(len(folders)) if index == 0 or folders[index] != folders[index - 1]]
    return [range(start, stop) for start, stop in pairwise([*starts, len(folders)])]


class FrameHistories(CodeStore):
    """Codes of one level of all frames that have `context_frames` frames before them, as the finest maps of a store.

    The coarser maps, on which the prior of the level is conditioned, are this level of the preceding frames, most
    recent first, the coarser levels of the frame itself, and the action that leads to the frame as a 1 × 1 map.

    Args:
        with_actions: Whether the action is one of the maps.
    """

    def __init__(self, frames: CodeStore, level: int, context_frames: int, with_actions: bool) -> None:
        clips = find_clips(frames)
        self.targets = np.concatenate(
            [np.arange(clip.start + context_frames, max(clip.stop, clip.start + context_frames)) for clip in clips]
        )
        if not len(self.targets):
            longest = max(map(len, clips))
            split = frames.header.split
            raise UserError(f"context_frames: no clip of {split} has more than {longest} frames. Lower it.")
        maps, actions = frames.header.levels, frames.header.classes
        levels = (*[maps[level]] * (context_frames + 1), *maps[level + 1 :])
        if with_actions:
            levels = (*levels, MapSpec(codebook_size=len(actions), height=1, width=1))
        header = frames.header.model_copy(update={"levels": levels, "classes": (), "count": len(self.targets)})
        super().__init__(frames.path, header)
        self.frames, self.level = frames, level
        self.context_frames, self.with_actions = context_frames, with_actions

    def __getitems__(self, keys: Sequence[Any]) -> CodeBatch:
        indices = [key[0] if isinstance(key, tuple) else key for key in keys]
        records = self.targets[indices][:, None] - np.arange(self.context_frames + 1)  # most recent first
        batch = self.frames.read(records.flatten().tolist())
        maps = [level.unflatten(0, records.shape) for level in batch.codes]
        codes = [*maps[self.level].unbind(1), *(level[:, 0] for level in maps[self.level + 1 :])]
        if self.with_actions:
            codes.append(batch.label.view(records.shape)[:, :1, None])
        return CodeBatch(tuple(codes), torch.full((len(records),), -1))

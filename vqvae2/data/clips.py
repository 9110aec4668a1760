"""Clips of frames, and the codes that the prior of a frame sees."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from vqvae2.code_maps import MapSpec
from vqvae2.data.code_store import CodeBatch, CodeStore
from vqvae2.data.images import ImageDataset
from vqvae2.errors import UserError


def find_clips(frames: CodeStore) -> list[range]:
    """Return the records of each clip. See `split_clips`.

    Raises:
        UserError: If frames are missing, because their images could not be read.
    """
    if frames.header.unreadable:
        raise UserError(
            f"{frames.path}: unreadable frames: {len(frames.header.unreadable)}. Replace their images, delete this "
            "folder and run `vqvae2 video train`."
        )
    return split_clips([frames.image_name(index) for index in range(len(frames))])


def split_clips(names: Sequence[str]) -> list[range]:
    """Return the indices of the frames of each clip: the images of one folder, in the order of their names.

    Raises:
        UserError: If the images of another folder are between the frames of a clip.

    >>> split_clips(["a/0", "a/1", "b/0"])
    [range(0, 2), range(2, 3)]
    """
    folders = [name.rpartition("/")[0] for name in names]
    starts = [index for index in range(len(folders)) if index == 0 or folders[index] != folders[index - 1]]
    found: set[str] = set()
    for start in starts:
        if folders[start] in found:
            between, clip = folders[start - 1], folders[start] or "in the top folder"
            raise UserError(f"data.path: the folder {between} is between the frames of the clip {clip}. Move it.")
        found.add(folders[start])
    return [range(start, stop) for start, stop in pairwise([*starts, len(folders)])]


def check_clips(splits: Sequence[ImageDataset]) -> None:
    """Check that the frames of each clip follow each other, and that labels change within clips, as actions do.

    Raises:
        UserError: If they do not. Labels that are the same for all frames of all clips are permitted.
    """
    labels = [{frames.label(index) for index in clip} for frames in splits for clip in split_clips(frames.names)]
    if all(len(each) == 1 for each in labels) and len(set.union(*labels)) > 1:
        raise UserError(
            "data.labels: the label never changes within a clip, so labels are not actions. Use `none`, or a table "
            "with the action that leads to each frame."
        )


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

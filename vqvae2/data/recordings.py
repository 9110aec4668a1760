"""Recordings of speech: a folder of WAV and FLAC files as µ-law values of a fixed length."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from vqvae2.audio.audio_io import read_waveform
from vqvae2.audio.mu_law import SILENCE, compand
from vqvae2.config import Config
from vqvae2.data.sources.base import is_hidden
from vqvae2.errors import UserError

_EXTENSIONS = (".flac", ".wav")


class RecordingsConfig(Config):
    """Which recordings to use, and how they are prepared."""

    path: str = Field(default="data/speech", description="folder of WAV and FLAC files")
    pattern: str | None = Field(
        default=None,
        description="regular expression for the path of a file below the folder, with the named group `speaker` and, "
        "optionally, `content`; the parent folder is the speaker if not given",
    )
    sample_rate: int = Field(default=8000, ge=1000, le=192_000, description="samples per second after resampling")
    length: int = Field(
        default=5120, ge=64, le=2**20, description="samples to which recordings are cut or padded with silence"
    )
    crop: int = Field(default=2048, ge=64, le=2**20, description="samples of a random training crop")
    peak: float | None = Field(
        default=0.95, gt=0, le=1, description="scale recordings to this peak amplitude; their own if not given"
    )
    holdout_interval: int = Field(
        default=10, ge=2, le=1000, description="hold out one in this many recordings of each speaker for validation"
    )
    num_workers: int = Field(default=0, ge=0, le=1024, description="processes that read recordings")

    @model_validator(mode="after")
    def _check(self) -> "RecordingsConfig":
        if self.crop > self.length:
            raise ValueError(f"crop ({self.crop}) must be at most length ({self.length})")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groupindex
            except re.error as error:
                raise ValueError(f"pattern: not a regular expression ({error})") from None
            if "speaker" not in groups:
                raise ValueError("pattern: must have the named group (?P<speaker>…)")
        return self

    def with_absolute_paths(self) -> "RecordingsConfig":
        """Return the settings with an absolute path, which does not depend on the working directory."""
        return self.model_copy(update={"path": str(Path(self.path).expanduser().absolute())})


class Clip(NamedTuple):
    """One clip or a batch."""

    values: UInt8[Tensor, "*b t"]  # µ-law
    speaker: Int[Tensor, "*b"]
    content: Int[Tensor, "*b"]  # −1 without contents
    length: Int[Tensor, "*b"]  # samples that were recorded; the rest is padding


class Recordings(Dataset[Clip]):
    """The recordings of one split.

    Indexed by integers it gives clips of `length` samples, by (index, augmentation seed) random crops for training.
    """

    def __init__(self, config: RecordingsConfig, names: Sequence[str], found: Sequence[tuple[str, str]]) -> None:
        self.config, self.folder = config, Path(config.path).expanduser()
        self.speakers = tuple(sorted({speaker for speaker, _ in found}))
        self.contents = tuple(sorted({content for _, content in found} - {""}))
        self.names, self._found = tuple(names), tuple(found)

    @property
    def classes_per_speaker(self) -> int:
        """Number of contents, at least 1. The class of a recording is speaker × this + content."""
        return max(1, len(self.contents))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of the prior, such as `george: 7`."""
        contents = [f": {content}" for content in self.contents] or [""]
        return tuple(f"{speaker}{content}" for speaker in self.speakers for content in contents)

    def select(self, indices: Sequence[int]) -> "Recordings":
        """Return a part of the recordings, with all speakers and contents."""
        part = Recordings(self.config, [self.names[i] for i in indices], [self._found[i] for i in indices])
        part.speakers, part.contents = self.speakers, self.contents
        return part

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: int | tuple[int, int]) -> Clip:
        index = key[0] if isinstance(key, tuple) else key
        values, recorded = read_values(self.folder / self.names[index], self.config)
        if isinstance(key, tuple):
            crop = self.config.crop
            # At least half of a crop was recorded; the other half may be padding, so that silence is learned too.
            last = min(max(recorded - crop // 2, 0), self.config.length - crop)
            start = int(np.random.default_rng(key[1]).integers(last + 1))
            values, recorded = values[start : start + crop], min(recorded - start, crop)
        return Clip(values, *map(torch.tensor, (*self.labels(index), recorded)))

    def labels(self, index: int) -> tuple[int, int]:
        """Return the numbers of a recording's speaker and content; the latter is −1 without contents."""
        speaker, content = self._found[index]
        return self.speakers.index(speaker), self.contents.index(content) if content else -1

    def caption(self, index: int) -> str:
        """Return a recording's speaker, and its content if there is one, such as `george: 7`."""
        return ": ".join(filter(None, self._found[index]))

    def digest(self) -> str:
        """Return the SHA-256 of the names, labels and preparation of the recordings, not of their location."""
        prepared = self.config.model_dump(include={"sample_rate", "length", "peak"})
        described = json.dumps([self.names, self._found, prepared], sort_keys=True)
        return hashlib.sha256(described.encode("utf-8", "surrogatepass")).hexdigest()


def open_recordings(config: RecordingsConfig) -> tuple[Recordings, Recordings]:
    """Return the recordings for training and for validation: every `holdout_interval`-th of each speaker by name.

    Raises:
        UserError: If there are too few recordings, a file name does not match `data.pattern`, or only some names have
            a content.
    """
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.path: no such directory: {config.path}. Check the path.")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in _EXTENSIONS and path.is_file() and not is_hidden(path.relative_to(folder).as_posix())
    )
    if not names:
        raise UserError(f"data.path: no WAV or FLAC files in {config.path}. Check the path.")
    recordings = Recordings(config, names, [_parse_name(name, config) for name in names])
    _check_contents(recordings)
    counts = dict.fromkeys(range(len(recordings.speakers)), 0)
    held_out = []
    for index in range(len(names)):
        speaker = recordings.labels(index)[0]
        if counts[speaker] % config.holdout_interval == 0:
            held_out.append(index)
        counts[speaker] += 1
    for speaker, count in counts.items():
        if count < 2:
            name = recordings.speakers[speaker]
            raise UserError(f"data.path: the speaker {name} has a single recording in {config.path}. Add another one.")
    training = sorted(set(range(len(names))) - set(held_out))
    return recordings.select(training), recordings.select(held_out)


def _check_contents(recordings: Recordings) -> None:
    """Check that all recordings have contents or none have."""
    without = [index for index in range(len(recordings)) if recordings.labels(index)[1] < 0]
    if recordings.contents and without:
        raise UserError(
            f"{recordings.config.path}/{recordings.names[without[0]]}: data.pattern finds no content in this name, but "
            "in others. Correct the pattern or move the file."
        )


def _parse_name(name: str, config: RecordingsConfig) -> tuple[str, str]:
    """Return the speaker and the content of a recording; the latter is empty if the pattern does not have it."""
    if config.pattern is None:
        if "/" not in name:
            raise UserError(
                f"{config.path}/{name}: not in the folder of a speaker. Move it to one, or set data.pattern."
            )
        return name.split("/")[-2], ""
    match = re.search(config.pattern, name)
    if match is None:
        raise UserError(f"{config.path}/{name}: does not match data.pattern. Correct the pattern or move the file.")
    return match["speaker"], match.groupdict().get("content") or ""


def read_values(path: Path, config: RecordingsConfig) -> tuple[UInt8[Tensor, " length"], int]:
    """Return the µ-law values of a file, cut or padded with silence to `length`, and how many were recorded.

    Raises:
        UserError: If the file cannot be read or has no samples.
    """
    values = torch.full((config.length,), SILENCE, dtype=torch.uint8)
    recorded = read_waveform(path, config.sample_rate, config.peak)[: config.length]
    values[: len(recorded)] = compand(torch.from_numpy(recorded))
    return values, len(recorded)


def collate(recordings: Recordings, indices: Sequence[int]) -> Clip:
    """Return a batch of clips."""
    return Clip(*map(torch.stack, zip(*(recordings[index] for index in indices), strict=True)))

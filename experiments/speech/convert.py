"""The command `vqvae2 speech convert`: encode recordings, and decode them as each speaker."""

from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from pydantic import Field
from torch import Tensor

from experiments.speech.speech_run import SpeechRun
from sampling.processes import on_main_process
from sampling.sample_waveforms import decode_speech
from vqvae2.audio.mu_law import expand
from vqvae2.command_line import Options
from vqvae2.data.recordings import read_values
from vqvae2.errors import UserError


class ConvertOptions(Options):
    """Encode held-out recordings, or other ones, and decode them with the voice of each speaker."""

    run: tyro.conf.Positional[Path] = Field(description="folder of a speech experiment")
    files: tuple[Path, ...] = Field(default=(), description="WAV or FLAC files; held-out recordings if not given")
    count: int = Field(default=6, ge=1, le=10_000, description="number of held-out recordings")
    speakers: tuple[str, ...] = Field(default=(), description="speakers to decode as; all if not given")
    temperature: float = Field(default=0.9, gt=0, description="divides the logits of the waveform")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="seed of the waveforms")


def convert(run: SpeechRun, options: ConvertOptions) -> None:
    """Write originals and conversions to RUN/conversions, or conversions-2, …, and update the run's page."""
    network = run.autoencoder
    for name in options.speakers:
        if name not in network.speakers:
            raise UserError(f"--speakers: no speaker {name!r}. The speakers are {', '.join(network.speakers)}.")
    speakers = options.speakers or network.speakers
    inputs = _read(run, options)
    with torch.inference_mode():
        codes = network.encode(torch.stack([each.values for each in inputs]).long())
    targets = torch.tensor([network.speakers.index(name) for name in speakers])
    rows = []
    for number, (each, code) in enumerate(zip(inputs, codes, strict=True)):
        clips = range(number * len(speakers), (number + 1) * len(speakers))  # for noise of their own
        repeated, lengths = code.expand(len(speakers), -1), torch.full((len(speakers),), each.length)
        decoded = decode_speech(network, repeated, targets, options.seed, options.temperature, clips, lengths)
        titles = ["reconstruction" if name == each.speaker else f"as {name}" for name in speakers]
        rows.append((each.caption, [("original", expand(each.values)), *zip(titles, decoded, strict=True)]))
    run.write_audio("Conversions", rows, options.seed, options.temperature, [network.digest])


class _Input(NamedTuple):
    """A recording to convert."""

    caption: str
    speaker: str | None  # None if it is not known
    values: Tensor  # µ-law (T,)
    length: int  # samples that were recorded


def _read(run: SpeechRun, options: ConvertOptions) -> list[_Input]:
    """Return the given recordings, or evenly spaced ones of those that are held out."""
    if options.files:
        return [_Input(path.name, None, *read_values(path, run.config.data)) for path in options.files]
    held_out = run.recordings[1]
    count = min(options.count, len(held_out))
    clips = [(held_out[index], held_out.caption(index)) for index in (k * len(held_out) // count for k in range(count))]
    return [
        _Input(caption, held_out.speakers[int(clip.speaker)], clip.values, int(clip.length)) for clip, caption in clips
    ]


def main(options: ConvertOptions) -> None:
    """Run the command `vqvae2 speech convert`."""
    on_main_process(convert, SpeechRun.existing(options.run), options)

"""The command `vqvae2 speech convert`: encode recordings, and decode them as each speaker."""

from pathlib import Path

import torch
import tyro
from pydantic import Field
from torch import Tensor

from experiments.speech.decoding import decode
from experiments.speech.mu_law import expand
from experiments.speech.page import write_audio
from experiments.speech.recordings import collate, fit_length, read_waveform
from experiments.speech.speech_run import SpeechRun
from vqvae2 import files
from vqvae2.command_line import Options
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
    """Write originals and conversions to RUN/conversions, and update the run's page."""
    network = run.autoencoder
    for name in options.speakers:
        if name not in network.speakers:
            raise UserError(f"--speakers: no speaker {name!r}. The speakers are {', '.join(network.speakers)}.")
    captions, values, lengths = _read(run, options)
    speakers = options.speakers or network.speakers
    with torch.inference_mode():
        codes = network.encode(values.long())
    repeats = len(speakers)
    targets = torch.tensor([network.speakers.index(name) for name in speakers]).repeat(len(codes))
    codes, lengths = codes.repeat_interleave(repeats, 0), lengths.repeat_interleave(repeats)
    decoded = decode(network, codes, targets, options.seed, options.temperature, lengths=lengths)
    titles = [f"as {name}" for name in speakers]
    rows = [
        (caption, [("original", original), *zip(titles, converted, strict=True)])
        for caption, original, converted in zip(captions, expand(values), decoded.split(repeats), strict=True)
    ]
    made_with = options.seed, options.temperature, (str(network.digest),)
    write_audio(run, run.folder.path / "conversions", rows, made_with)
    print(run.page)


def _read(run: SpeechRun, options: ConvertOptions) -> tuple[list[str], Tensor, Tensor]:
    """Return captions, µ-law values (N, T) and recorded lengths (N,)."""
    if options.files:
        data = run.config.data
        clips = [fit_length(read_waveform(path, data), data.length) for path in options.files]
        return (
            [path.name for path in options.files],
            torch.stack([v for v, _ in clips]),
            torch.tensor([n for _, n in clips]),
        )
    held_out = run.recordings[1]
    count = min(options.count, len(held_out))
    indices = [index * len(held_out) // count for index in range(count)]
    batch = collate(held_out, indices)
    return [held_out.caption(index) for index in indices], batch.values, batch.length


def main(options: ConvertOptions) -> None:
    """Run the command `vqvae2 speech convert`."""
    run = SpeechRun.existing(options.run)
    files.lock_folder(run.folder.path)
    convert(run, options)

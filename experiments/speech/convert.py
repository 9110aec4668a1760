"""The command `vqvae2 speech convert`: encode recordings, and decode them as each speaker."""

from pathlib import Path

import torch
import tyro
from pydantic import Field

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
    network, data = run.autoencoder, run.recordings[1]
    for name in options.speakers:
        if name not in network.speakers:
            raise UserError(f"--speakers: no speaker {name!r}. The speakers are {', '.join(network.speakers)}.")
    if options.files:
        captions = [path.name for path in options.files]
        waveforms = [read_waveform(path, data.config) for path in options.files]
        values = torch.stack([fit_length(waveform, data.config.length) for waveform in waveforms])
    else:
        count = min(options.count, len(data))
        indices = [index * len(data) // count for index in range(count)]
        captions, values = [data.caption(index) for index in indices], collate(data, indices).values
    speakers = options.speakers or network.speakers
    with torch.inference_mode():
        codes = network.encode(values.long())
    targets = torch.tensor([network.speakers.index(name) for name in speakers]).repeat(len(codes))
    decoded = decode(
        network, codes.repeat_interleave(len(speakers), 0), targets, options.seed, options.temperature
    ).unflatten(0, (-1, len(speakers)))
    rows = [
        (caption, [("original", original), *((f"as {name}", each) for name, each in zip(speakers, row, strict=True))])
        for caption, original, row in zip(captions, expand(values), decoded, strict=True)
    ]
    made_with = options.seed, options.temperature, (str(network.digest),)
    write_audio(run, run.folder.path / "conversions", rows, made_with)
    print(run.page)


def main(options: ConvertOptions) -> None:
    """Run the command `vqvae2 speech convert`."""
    run = SpeechRun.existing(options.run)
    files.lock_folder(run.folder.path)
    convert(run, options)

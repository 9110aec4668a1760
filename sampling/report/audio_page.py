"""Folders of WAV files with spectrograms and a manifest, and the page that plays them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from sampling.output_folder import next_free
from sampling.report.templates import make_environment
from vqvae2 import files
from vqvae2.audio.audio_io import save_wav
from vqvae2.audio.spectrogram_plot import save_spectrograms
from vqvae2.config import Config

_FIX = "Delete the folder and run the command that writes it again."


class Cell(Config):
    """One audio file."""

    caption: str
    file: str = Field(pattern=r"^\d+-\d+\.wav$")


class Row(Config):
    """Audio files that are shown together."""

    caption: str
    cells: tuple[Cell, ...]


class AudioManifest(Config):
    """How the audio files in a folder were made."""

    seed: int = Field(ge=0, le=2**63 - 1)
    temperature: float
    networks: tuple[str, ...]  # digests
    rows: tuple[Row, ...]

    @classmethod
    def path(cls, folder: Path) -> Path:
        return folder / "manifest.json"


def write_audio(
    folder: Path,
    rows: Sequence[tuple[str, Sequence[tuple[str, Float[Tensor, " t"]]]]],
    sample_rate: int,
    seed: int,
    temperature: float,
    networks: Sequence[str | None],
) -> Path:
    """Write WAV files, their spectrograms and their manifest to a folder, and return it.

    Args:
        folder: The folder, or the first of NAME-2, NAME-3, … without a manifest if it has one.
        rows: Caption and titled waveforms of each row.
        networks: Digests of the networks that the waveforms were sampled from.
    """
    folder = next_free(folder, lambda path: not AudioManifest.path(path).is_file())
    described = []
    for number, (caption, waveforms) in enumerate(rows):
        cells = [
            Cell(caption=title, file=f"{number:03d}-{index:02d}.wav") for index, (title, _) in enumerate(waveforms)
        ]
        for cell, (_, waveform) in zip(cells, waveforms, strict=True):
            save_wav(folder / cell.file, waveform, sample_rate)
        described.append(Row(caption=caption, cells=tuple(cells)))
    save_spectrograms(folder / "spectrograms.png", rows, sample_rate)
    digests = tuple(str(digest) for digest in networks)
    manifest = AudioManifest(seed=seed, temperature=temperature, networks=digests, rows=tuple(described))
    files.write_json(AudioManifest.path(folder), manifest.to_dict())
    return folder


def write_audio_page(path: Path, title: str, sections: Mapping[str, str]) -> None:
    """Write a page that plays the audio files of folders beside it.

    Args:
        sections: Heading and name of the first folder of each section; NAME-2, NAME-3, … follow it.
    """
    found = []
    for heading, name in sections.items():
        folder, number = path.parent / name, 1
        while AudioManifest.path(folder).is_file():
            title_of_folder = heading if number == 1 else f"{heading} {number}"
            found.append((title_of_folder, folder.name, AudioManifest.from_json(AudioManifest.path(folder), _FIX)))
            number += 1
            folder = path.parent / f"{name}-{number}"
    page = make_environment().get_template("audio_page.html").render(title=title, sections=found)
    files.write_text(path, page)

"""Folders of WAV files with spectrograms and a manifest, and the page that plays them."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import Field
from torch import Tensor

from experiments.speech.decoding import save_spectrograms, save_wav
from experiments.speech.speech_run import SpeechRun
from vqvae2 import files
from vqvae2.config import Config

_SECTIONS = {"Conversions": "conversions", "Samples": "samples"}  # title → folder
_FIX = "Delete the folder and run the command that writes it again."


class Cell(Config):
    """One audio file."""

    caption: str
    file: str


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


def write_audio(
    run: SpeechRun,
    folder: Path,
    rows: Sequence[tuple[str, Sequence[tuple[str, Float[Tensor, " t"]]]]],
    made_with: tuple[int, float, tuple[str, ...]],
) -> None:
    """Write WAV files, their spectrograms and their manifest, and the run's page. Audio files there are replaced.

    Args:
        rows: Caption and titled waveforms of each row.
        made_with: Seed, temperature, and digests of the networks.
    """
    rate = run.config.data.sample_rate
    for old in folder.glob("*.wav"):
        old.unlink()
    described = []
    for number, (caption, waveforms) in enumerate(rows):
        cells = [
            Cell(caption=title, file=f"{number:03d}-{index:02d}.wav") for index, (title, _) in enumerate(waveforms)
        ]
        for cell, (_, waveform) in zip(cells, waveforms, strict=True):
            save_wav(folder / cell.file, waveform, rate)
        described.append(Row(caption=caption, cells=tuple(cells)))
    save_spectrograms(folder / "spectrograms.png", dict(rows), rate)
    seed, temperature, networks = made_with
    manifest = AudioManifest(seed=seed, temperature=temperature, networks=networks, rows=tuple(described))
    files.write_json(folder / "manifest.json", manifest.to_dict())
    _write_page(run)


def _write_page(run: SpeechRun) -> None:
    found = [
        (title, name, AudioManifest.from_json(run.folder.path / name / "manifest.json", _FIX))
        for title, name in _SECTIONS.items()
        if (run.folder.path / name / "manifest.json").is_file()
    ]
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    title = f"Speech: {run.folder.path.absolute().name}"
    files.write_text(run.page, environment.get_template("page.html").render(title=title, sections=found))

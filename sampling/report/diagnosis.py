"""The contents of diagnosis.json, which `vqvae2 diagnose` writes and the report shows."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from vqvae2.config import Config
from vqvae2.errors import UserError

_FIX = "Delete the folder and run `vqvae2 diagnose` again."


class Diagnosis(Config):
    """Contents of diagnosis.json."""

    count: int = Field(ge=1, le=2**16)  # images
    seed: int = Field(ge=0, le=2**63 - 1)
    rows: tuple[str, ...]  # names of the rows of diagnosis.png
    autoencoder: str  # digest
    priors: tuple[str, ...]  # digests, finest level first
    torch: str  # version


def diagnosis_path(folder: Path) -> Path:
    """Return the path of the record in a folder of diagnostic images."""
    return folder / "diagnosis.json"


def read_diagnosis(folder: Path, levels: Sequence[str]) -> Diagnosis | None:
    """Return the record in a folder of diagnostic images, or None if it has none.

    Raises:
        UserError: If it is invalid, or has a row that does not belong to a run with these `levels`.
    """
    path = diagnosis_path(folder)
    if not path.is_file():
        return None
    diagnosis = Diagnosis.from_json(path, _FIX)
    unknown = [row for row in diagnosis.rows if row not in row_captions(levels)]
    if unknown:
        raise UserError(f"{path}: rows: {unknown[0][:80]!r} is not a row of this run. {_FIX}")
    return diagnosis


def row_captions(levels: Sequence[str]) -> dict[str, str]:
    """Return a description of each row that a diagnosis can have, by its name."""
    rows = {
        f"true-{level}": f"codes from the encoder down to the {level} level, finer codes sampled" for level in levels
    }
    return rows | {"reconstruction": "all codes from the encoder", "sampled": "all codes sampled"}

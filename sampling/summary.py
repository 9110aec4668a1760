"""The summary.json of a finished stage: how long it took, and its last validation."""

from pathlib import Path

from pydantic import Field

from vqvae2.config import Config, Measured

_FIX = "Restore it, or delete it: the stage stays complete, but its metrics and time are then missing."


class Summary(Config):
    """Contents of summary.json."""

    seconds: float = Field(ge=0, le=1e12)
    steps: int | None = Field(default=None, ge=0, le=2**40)  # of training
    validation: dict[str, Measured] = Field(default_factory=dict)  # metrics of the last validation of training
    images: int | None = Field(default=None, ge=0, le=2**40)  # sampled by the command that took the time
    images_per_second: Measured | None = None


def read_summary(path: Path) -> Summary | None:
    """Return the summary at `path`, or None if there is none.

    Raises:
        UserError: If it is invalid.
    """
    return Summary.from_json(path, _FIX) if path.is_file() else None

"""RunFolder: every path in a run folder."""

from dataclasses import dataclass
from pathlib import Path

from vqvae2.errors import UserError

WEIGHTS = "model.safetensors"


def level_names(count: int) -> tuple[str, ...]:
    """Return the names of `count` levels, finest first. A single level is `top`.

    >>> level_names(3)
    ('bottom', 'middle', 'top')
    """
    if count <= 2:
        return ("bottom", "top")[2 - count :]
    middles = ("middle",) if count == 3 else tuple(f"middle{index}" for index in range(1, count - 1))
    return ("bottom", *middles, "top")


@dataclass(frozen=True)
class StageFolder:
    """Paths in the folder of a training stage."""

    path: Path

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def previews(self) -> Path:
        return self.path / "previews"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def metric_log(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of the checkpoints, in order."""
        return sorted(int(path.name) for path in self.checkpoints.glob("[0-9]*") if path.name.isdigit())

    def preview(self, step: int) -> Path:
        return self.previews / f"{step:08d}.png"

    def newest_preview(self) -> Path | None:
        return max(self.previews.glob("*.png"), key=lambda path: (len(path.name), path.name), default=None)


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run folder. Nothing is created or read."""

    path: Path

    @classmethod
    def existing(cls, path: Path, command: str = "vqvae2 run") -> "RunFolder":
        """Return the folder of a run that has begun. `command` creates runs of its kind.

        Raises:
            UserError: If `path` is not a run folder.
        """
        folder = cls(path)
        if not folder.config.is_file():
            raise UserError(f"{path}: not a run folder (no config.yaml). Create one with `{command} CONFIG`.")
        return folder

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def pipeline_config(self) -> Path:
        return self.path / "config.json"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def data_index(self) -> Path:
        return self.path / "data-index.safetensors"

    @property
    def data_identity(self) -> Path:
        return self.path / "data-identity.json"

    @property
    def changes(self) -> Path:
        return self.path / "changes.json"

    @property
    def autoencoder(self) -> StageFolder:
        return StageFolder(self.path / "autoencoder")

    @property
    def autoencoder_weights(self) -> Path:
        return self.autoencoder.weights

    @property
    def codes(self) -> Path:
        return self.path / "codes"

    @property
    def codes_summary(self) -> Path:
        return self.codes / "summary.json"

    def code_store(self, split: str) -> Path:
        return self.codes / split

    def prior(self, level: str) -> StageFolder:
        return StageFolder(self.path / f"prior-{level}")

    def prior_weights(self, level: str) -> Path:
        return self.prior(level).weights

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def diagnosis(self) -> Path:
        return self.path / "diagnosis"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def metrics(self) -> Path:
        return self.evaluation / "metrics.json"

    @property
    def tuning(self) -> Path:
        return self.evaluation / "tuning.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

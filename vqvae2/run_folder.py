"""Where everything of one experiment lies: the names of the files and folders in a run folder."""

from dataclasses import dataclass
from pathlib import Path

from vqvae2.errors import UserError


def level_names(count: int) -> tuple[str, ...]:
    """Names of `count` levels, finest first: bottom … top; a single level is `top`, the one nothing conditions."""
    if count <= 2:
        return ("bottom", "top")[2 - count :]
    middles = ("middle",) if count == 3 else tuple(f"middle{index}" for index in range(1, count - 1))
    return ("bottom", *middles, "top")


@dataclass(frozen=True)
class RunFolder:
    """The paths in a run folder. Nothing is created or read until asked for."""

    path: Path

    @classmethod
    def existing(cls, path: Path) -> "RunFolder":
        """A run that has begun; UserError where `path` is not one."""
        folder = cls(path)
        if not folder.config.is_file():
            raise UserError(f"{path}: not a run folder (it has no config.yaml); make one with `vqvae2 run CONFIG`")
        return folder

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def autoencoder(self) -> Path:
        return self.path / "autoencoder"

    @property
    def autoencoder_weights(self) -> Path:
        return self.autoencoder / "model.safetensors"

    @property
    def data_index(self) -> Path:
        return self.path / "data-index.safetensors"

    @property
    def codes(self) -> Path:
        return self.path / "codes"

    def code_store(self, split: str) -> Path:
        return self.codes / split

    def prior(self, level: str) -> Path:
        return self.path / f"prior-{level}"

    def prior_weights(self, level: str) -> Path:
        return self.prior(level) / "model.safetensors"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def metrics(self) -> Path:
        return self.evaluation / "metrics.json"

"""The record of settings that were changed in the middle of a run."""

from typing import Any

from pydantic import Field

from vqvae2 import files
from vqvae2.config import Config
from vqvae2.run_folder import RunFolder


class SettingChange(Config):
    """One changed setting."""

    stage: str  # name of the stage's folder: "prior-top"
    step: int = Field(ge=0)  # steps that were trained with the old value
    setting: str  # key path in the config
    before: Any
    after: Any


class RunChanges(Config):
    """Contents of changes.json, oldest change first."""

    changes: tuple[SettingChange, ...] = ()

    @classmethod
    def read(cls, folder: RunFolder) -> "RunChanges":
        """Return the changes recorded in a run folder.

        Raises:
            UserError: If the file is damaged.
        """
        if not folder.changes.is_file():
            return cls()
        return cls.from_json(folder.changes, fix="Restore it, or delete it to forget the changes.")

    def append(self, folder: RunFolder, changes: list[SettingChange]) -> None:
        """Record further changes in a run folder. A change that is already recorded is not repeated."""
        new = tuple(change for change in changes if change not in self.changes)
        files.write_json(folder.changes, RunChanges(changes=self.changes + new).to_dict())

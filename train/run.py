"""Open a run: read its config, and create or resume its run folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from sampling.processes import processes
from sampling.run_config import RunConfig
from sampling.run_data import open_run_datasets
from vqvae2 import files
from vqvae2.command_line import Options, parse
from vqvae2.config import differences, is_resolved
from vqvae2.data.sources import absolute_source
from vqvae2.errors import UserError
from vqvae2.run_folder import RunFolder

# Settings that may change when a run is resumed, because the trained artifacts do not depend on them.
_CHANGEABLE = (
    "data.path",
    "data.num_workers",
    "data.max_unreadable_fraction",
    "data.max_pixels",
    "extract_codes.batch_size",
    "sampling",
    "evaluation",
    *(f"training.{name}" for name in ("log_every", "validate_every", "preview_every", "checkpoint_every")),
    "training.keep_checkpoints",
    "training.compile",
    "training.gradient_accumulation_steps",
    "training.gradient_checkpointing",
    "autoencoder.loss.perceptual.weights",
)


class RunOptions(Options, RunConfig):
    """Options of a training command: a config file, and `--section.field VALUE` for any of its settings."""

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], prog: str) -> Self:
        if not arguments or arguments[0].startswith("-"):
            if not {"-h", "--help"} & set(arguments):
                raise UserError(f"CONFIG: missing. Give a YAML file first: {prog} CONFIG.yaml [--section.field VALUE]")
            return parse(cls, arguments, f"{prog} CONFIG.yaml", cls.from_yaml(demo_config()))
        path, *overrides = arguments
        return cls.from_config(Path(path), overrides, f"{prog} {path}")

    @classmethod
    def from_config(cls, path: Path, overrides: Sequence[str], prog: str) -> Self:
        """Return the settings in a YAML file with overrides applied, and the run folder resolved."""
        default = cls.from_yaml(path)
        if is_resolved(path):  # the config of a run, which may have been moved
            default = default.model_copy(update={"run": str(path.parent)})
        options = parse(cls, overrides, prog, default)
        data = options.data.model_copy(update={"path": absolute_source(options.data.path)})
        return options.model_copy(update={"run": options.run or str(Path("runs") / path.stem), "data": data})

    @property
    def config(self) -> RunConfig:
        """The settings without those that a command adds."""
        return RunConfig(**{name: getattr(self, name) for name in RunConfig.model_fields})


@dataclass(frozen=True)
class Run:
    """A config and its run folder."""

    config: RunConfig
    folder: RunFolder


def demo_config() -> Path:
    """Return the path of demo.yaml: beside this module in a wheel, in configs/ in a checkout."""
    packaged = Path(__file__).with_name("demo.yaml")
    return packaged if packaged.is_file() else Path(__file__).parents[1] / "configs" / "demo.yaml"


def open_run(options: RunOptions) -> Run:
    """Create the run folder with its resolved config, or check that an existing one has the same config.

    Raises:
        UserError: If the folder holds another run. The message names the first setting that differs.
    """
    config = options.config
    folder = RunFolder(Path(config.run or "runs"))
    with torch.device("meta"):  # raises before anything is written if sizes do not divide
        config.autoencoder.model.build(config.data.shape, config.data.channels)
    with processes().main_process_first():  # the other processes then find what the main process has written
        _check_folder(config, folder)
        if processes().is_main_process:
            files.lock_folder(folder.path)
            files.write_text(folder.config, config.to_yaml())
    return Run(config, folder)


def _check_folder(config: RunConfig, folder: RunFolder) -> None:
    if folder.config.is_file():
        previous = RunConfig.from_resolved_yaml(folder.config)
        for key, old, new in differences(previous.to_dict(), config.to_dict()):
            if key != "run" and not any(key.startswith(name) or f".{name}" in key for name in _CHANGEABLE):
                raise UserError(
                    f"{folder.path}: this run was made with {key} = {json.dumps(old)}, not {json.dumps(new)}. "
                    "Choose another folder with --run, or restore the setting."
                )
        if previous.data.path != config.data.path:
            open_run_datasets(config.data, folder, use_cache=False)
    elif folder.path.is_dir() and any(child.name != files.LOCK_NAME for child in folder.path.iterdir()):
        raise UserError(f"{folder.path}: not empty, and not a run folder. Choose another folder with --run.")


def print_main(text: str) -> None:
    """Print a line from the main process only."""
    if processes().is_main_process:
        print(text, flush=True)

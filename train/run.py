"""Open a run: read its config, and create or resume its run folder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field

from sampling.processes import processes
from sampling.run_changes import RunChanges, SettingChange
from sampling.run_config import RunConfig
from sampling.run_data import open_run_datasets
from train.checkpoints import check_made_from
from vqvae2 import checkpoint, files
from vqvae2.command_line import Options, parse, split_config_path
from vqvae2.config import Config, differences, is_resolved
from vqvae2.errors import UserError
from vqvae2.metrics.reconstruction import SSIM_WINDOW
from vqvae2.models import Autoencoder
from vqvae2.priors import Prior, load_prior
from vqvae2.run_folder import RunFolder, StageFolder

# Settings that may change when a run is resumed, because the trained artifacts do not depend on them.
_CHANGEABLE = (
    "data.path",
    "data.val_path",
    "data.num_workers",
    "data.max_unreadable_fraction",
    "extract_codes.batch_size",
    "tracker",
    "sampling",
    "evaluation",
    *(f"training.{name}" for name in ("log_every", "validate_every", "preview_every", "checkpoint_every")),
    "training.keep_checkpoints",
    "training.compile",
    "training.gradient_accumulation_steps",
    "training.gradient_checkpointing",
    "autoencoder.loss.perceptual.weights",
)

# Training settings that may change in the middle of a stage, with `resume_with_changes`. The result depends on them.
_CHANGEABLE_IN_TRAINING = (
    "steps",
    "batch_size",
    "learning_rate",
    "embedding_learning_rate",
    "schedule",
    "warmup_steps",
    "weight_decay",
    "betas",
    "max_grad_norm",
    "mixed_precision",
    "early_stopping_patience",
    "validate_every",
)


class ConfigOptions(Options):
    """Options of a training command: a config file, and `--section.field VALUE` for any of its settings.

    A subclass also inherits the class of the settings, which has the fields `run` and `data`.
    """

    config_class: ClassVar[type[Config]]  # the settings without those that a command adds

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], prog: str) -> Self:
        path, overrides = split_config_path(arguments, prog)
        if path is None:
            return parse(cls, arguments, f"{prog} CONFIG.yaml")
        return cls.from_config(path, overrides, f"{prog} {path}")

    @classmethod
    def from_config(cls, path: Path, overrides: Sequence[str], prog: str) -> Self:
        """Return the settings in a YAML file with overrides applied, and with absolute paths and the run folder."""
        is_run = is_resolved(path)  # the config of a run, which may have been moved
        if is_run:
            cls.config_class.from_resolved_yaml(path)  # raises if it is a run of another kind
        default = cls.from_yaml(path)
        if is_run:
            default = default.model_copy(update={"run": str(path.parent)})
        options: Any = parse(cls, overrides, prog, default)
        run = options.run or str(Path("runs") / path.stem)
        return options.model_copy(update={"run": run, "data": options.data.with_absolute_paths()})

    @property
    def config(self) -> Any:
        """The settings without those that a command adds."""
        return self.config_class(**{name: getattr(self, name) for name in self.config_class.model_fields})


class RunOptions(ConfigOptions, RunConfig):
    """Options of a training command of a run on images."""

    config_class: ClassVar[type[Config]] = RunConfig

    resume_with_changes: bool = Field(
        default=False, description="continue an existing run with changed training settings, and record the changes"
    )

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], prog: str) -> Self:
        path, overrides = split_config_path(arguments, prog)
        if path is None:
            return parse(cls, arguments, f"{prog} CONFIG.yaml", cls.from_yaml(demo_config()))
        return cls.from_config(path, overrides, f"{prog} {path}")

    @classmethod
    def from_config(cls, path: Path, overrides: Sequence[str], prog: str) -> Self:
        options = super().from_config(path, overrides, prog)
        autoencoder = options.autoencoder
        if autoencoder.pretrained is not None and (source := Path(autoencoder.pretrained).expanduser()).exists():
            autoencoder = autoencoder.model_copy(update={"pretrained": str(source.absolute())})
        return options.model_copy(update={"autoencoder": autoencoder})


@dataclass(frozen=True)
class BaseRun:
    """A config and its run folder. Each kind of run is a subclass, which adds what its folder holds."""

    config: Config
    folder: RunFolder

    config_class: ClassVar[type[Config]]
    command: ClassVar[str]  # that creates runs of this kind

    @classmethod
    def existing(cls, path: Path) -> Self:
        """Return the run in a folder, and reserve the folder for this command; its main process holds the lock.

        Raises:
            UserError: If `path` is not the folder of such a run, or another process has reserved it.
        """
        folder = RunFolder.existing(path, cls.command)
        if processes().is_main_process:
            files.lock_folder(path)
        return cls(cls.config_class.from_resolved_yaml(folder.config), folder)

    @classmethod
    def open(cls, options: ConfigOptions, with_changes: bool = False, shared: bool = False) -> Self:
        """Create the run folder with its resolved config, or check that an existing one has the same config.

        With `with_changes`, settings of training may differ from those of the existing run. Each change is recorded in
        the run folder with the step of the most recent checkpoint, at which it takes effect. All settings may differ if
        nothing has been made with the existing ones.

        With `shared`, other processes that share it can use the folder at the same time, unless settings change.

        Raises:
            UserError: If the folder holds another run, or another process has reserved it. The message names the first
                setting that differs, or the process.
        """
        run = cls(options.config, RunFolder(Path(options.config.run or "runs")))
        folder, changes, previous = run.folder, [], None
        with processes().main_process_first():  # the other processes then find what the main process has written
            if folder.config.is_file():
                previous = cls.config_class.from_resolved_yaml(folder.config)
                if previous != run.config and _has_only_settings(folder):
                    previous = None  # an earlier command failed before it opened the data
                else:
                    changes = _find_changes(previous, run.config, folder, with_changes)
            else:
                check_unused(folder.path)
            run.check(previous)
            if processes().is_main_process:
                files.lock_folder(folder.path, shared and not changes)
                if changes:
                    _apply_changes(changes, folder)
                files.write_text(folder.config, run.config.to_yaml())
        return run

    def check(self, previous: Any) -> None:
        """Check what the config class cannot, before anything is written.

        Args:
            previous: Settings of the existing run, or None.

        Raises:
            UserError: If the run cannot be trained with its settings.
        """


@dataclass(frozen=True)
class Run(BaseRun):
    """A run on images."""

    config: RunConfig

    config_class: ClassVar[type[Config]] = RunConfig
    command: ClassVar[str] = "vqvae2 run"

    def check(self, previous: RunConfig | None) -> None:
        data = self.config.data
        if min(data.shape) < SSIM_WINDOW:
            raise UserError(f"data.size: must be at least {SSIM_WINDOW}, the window of SSIM, not {min(data.shape)}")
        with torch.device("meta"):  # raises if sizes do not divide
            self.config.autoencoder.model.build(data.shape, data.channels)
        if previous and (previous.data.path, previous.data.val_path) != (data.path, data.val_path):
            open_run_datasets(data, self.folder, use_cache=False)
        _check_pretrained(self.config, self.folder)


def demo_config() -> Path:
    """Return the path of demo.yaml: beside this module in a wheel, in configs/ in a checkout."""
    packaged = Path(__file__).with_name("demo.yaml")
    return packaged if packaged.is_file() else Path(__file__).parents[1] / "configs" / "demo.yaml"


def open_run(options: RunOptions, shared: bool = False) -> Run:
    """Create or resume the run on images that a command's options describe. See `BaseRun.open`."""
    return Run.open(options, options.resume_with_changes, shared)


def _find_changes(previous: Config, config: Config, folder: RunFolder, with_changes: bool) -> list[SettingChange]:
    """Return the differences from the settings that the run was made with, if they are permitted."""
    changes = []
    for key, old, new in fixed_differences(previous, config):
        if key == "data.max_pixels" and not _has_begun(folder.autoencoder):
            continue  # decides which images are unreadable, and none have been read
        possible = _is_changeable_in_training(key, folder)
        change = _change_of_stage(key, old, new, folder) if possible else None
        if not (possible and with_changes):
            advice = "add --resume-with-changes to continue with the new value, " if possible else ""
            raise UserError(
                f"{folder.path}: this run was made with {key} = {json.dumps(old)}, not {json.dumps(new)}. "
                f"Choose another folder with --run, {advice}or restore the setting."
            )
        if change:
            changes.append(change)
            _check_early_stopping(key, previous, config, folder)
    return changes


def fixed_differences(previous: Config, config: Config) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key path, previous value, new value) of the settings that differ and that trained artifacts depend on."""
    for key, old, new in differences(previous.to_dict(), config.to_dict()):
        changeable = any(key.startswith(name) or f".{name}" in key for name in _CHANGEABLE)
        if key.endswith("training.validate_every"):  # then decides when training stops, and which weights are best
            changeable = _training_settings(previous.to_dict(), key)["early_stopping_patience"] is None
        if key != "run" and not changeable:
            yield key, old, new


def check_unused(folder: Path) -> None:
    """Raise UserError if a folder that is about to become a run folder holds other files."""
    if folder.is_dir() and not all(files.is_leftover(child.name) for child in folder.iterdir()):
        raise UserError(f"{folder}: not empty, and not a run folder. Choose another folder with --run.")


def _has_only_settings(folder: RunFolder) -> bool:
    names = {child.name for child in folder.path.iterdir() if not files.is_leftover(child.name)}
    return names <= {folder.config.name, folder.data_index.name}


def _stage_of(key: str, folder: RunFolder) -> StageFolder | None:
    """Return the folder of the training stage that a setting belongs to."""
    section, _, rest = key.partition(".")
    if section == "autoencoder":
        return folder.autoencoder
    return folder.prior(rest.partition(".")[0]) if section == "priors" else None


def _has_begun(stage: StageFolder) -> bool:
    return stage.weights.is_file() or bool(stage.checkpoint_steps())


def _is_changeable_in_training(key: str, folder: RunFolder) -> bool:
    """Return whether `resume_with_changes` permits another value: any before the stage, some in its training."""
    stage = _stage_of(key, folder)
    if stage is None:
        return False
    name = key.partition(".training.")[2].partition(".")[0]
    return not _has_begun(stage) or name in _CHANGEABLE_IN_TRAINING


def _change_of_stage(key: str, old: Any, new: Any, folder: RunFolder) -> SettingChange | None:
    """Return the change of a stage that has begun, or None.

    Raises:
        UserError: If the stage cannot be continued with the change.
    """
    stage = _stage_of(key, folder)
    if stage is None or not _has_begun(stage):
        return None
    if stage == folder.autoencoder and folder.codes.exists():
        raise UserError(
            f"{key}: {folder.codes} was made from the autoencoder as it is. Start another run with "
            f"--autoencoder.pretrained {folder.path}, or delete {folder.codes} and all priors to train it further."
        )
    step = max(stage.checkpoint_steps(), default=0)
    if not step:
        raise UserError(f"{key}: {stage.path} has no checkpoint to continue from. Start another run with --run.")
    if key.endswith(".steps") and new < step:
        raise UserError(f"{key}: {new} is less than the {step} steps trained already. Give at least {step}.")
    return SettingChange(stage=stage.path.name, step=step, setting=key, before=old, after=new)


def _check_early_stopping(key: str, previous: Config, config: Config, folder: RunFolder) -> None:
    """Check that a stage that stopped early would continue with its new settings.

    Raises:
        UserError: If it would stop at once.
    """
    stage = _stage_of(key, folder)
    before, after = (_training_settings(each.to_dict(), key) for each in (previous, config))
    patience = after["early_stopping_patience"]
    if stage is None or not stage.weights.is_file() or patience is None:
        return
    step = max(stage.checkpoint_steps(), default=0)  # not that of the summary, whose weights are the best, not the last
    if step < before["steps"] and patience <= before["early_stopping_patience"]:
        raise UserError(
            f"{key}: training stopped early at step {step:,}. To continue, also raise early_stopping_patience, now "
            f"{patience}."
        )


def _training_settings(settings: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the training section that the setting at a key path belongs to."""
    path = key.split(".")
    for section in path[: path.index("training") + 1]:
        settings = settings[section]
    return settings


def _apply_changes(changes: list[SettingChange], folder: RunFolder) -> None:
    """Record changes, and reopen completed stages. Their weights are kept under a name with the step."""
    RunChanges.read(folder).append(folder, changes)
    for change in changes:
        weights = StageFolder(folder.path / change.stage).weights
        if weights.is_file():
            weights.rename(weights.with_stem(f"{weights.stem}-{change.step:08d}"))


def _check_pretrained(config: RunConfig, folder: RunFolder) -> None:
    """Check that the pretrained weights belong to the model of the config, unless they have been used already."""
    source = config.autoencoder.pretrained
    if source is None or folder.autoencoder_weights.is_file():
        return
    model, channels = Autoencoder.read_pretrained_config(source)
    found = {"model": model.to_dict(), "channels": channels}
    expected = {"model": config.autoencoder.model.to_dict(), "channels": config.data.channels}
    for key, theirs, ours in differences(found, expected):
        raise UserError(
            f"autoencoder.{key} is {json.dumps(ours)}, but {source} has {json.dumps(theirs)}. Use the same value, or "
            "give the path in the config file and leave out `autoencoder.model`."
            if key.startswith("model")
            else f"data.channels is {ours}, but {source} was trained on images with {theirs} channels."
        )


def is_finished(weights: Path, made_from: Mapping[str, str | None]) -> bool:
    """Return whether a stage has written its weights, and say so.

    Raises:
        UserError: If they were made from other artifacts than those with the digests `made_from`.
    """
    if not weights.is_file():
        return False
    check_made_from(checkpoint.read_metadata(weights).get("made_from", {}), made_from, weights)
    print_main(f"{weights.parent.name}: already complete, {weights}")
    return True


def load_run_prior(path: Path, autoencoder: str | None) -> Prior:
    """Load a prior, and check that it was trained on codes of the autoencoder with this digest.

    Raises:
        UserError: If the file is missing or damaged, or the prior was trained on other codes.
    """
    prior = load_prior(path)
    check_made_from(prior.made_from, {"autoencoder": autoencoder}, path)
    return prior


def print_main(text: str) -> None:
    """Print a line from the main process only."""
    if processes().is_main_process:
        print(text, flush=True)

"""The training loop, the only one and the only user of Accelerate's training wrapper: both stages run in it.

A stage brings its data, its objective and its pictures; the loop brings devices, precision, accumulation, clipping, the
learning-rate schedule, averaged weights, validation, logs, checkpoints and resuming. One unit counts progress: the
step, one update of the weights from one global batch. Random numbers of a step depend on (seed, step, process) alone,
so the same command goes on from any checkpoint to the same result.

A stage may have an auxiliary, a second network trained against the first. Both gradients of a step are taken at the
weights that the step began with, so accumulated batches, and several processes, still come to what one batch would.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from pydantic import Field, model_validator
from torch import Tensor, nn
from tqdm import tqdm

from train.checkpoints import Checkpoints, Optimized, TrainingState
from train.metric_log import MetricLog
from train.signals import StopSignals
from vqvae2 import files
from vqvae2.config import Config
from vqvae2.data.samplers import MapDataset, ResumableBatchSampler, load_batches
from vqvae2.errors import Stopped, UserError


class TrainingConfig(Config):
    """How one network is trained; every interval counts steps."""

    steps: int = Field(ge=1)
    batch_size: int = Field(default=128, ge=1, description="of all processes and accumulated batches together")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="smaller batches that make up one, one after the other"
    )
    learning_rate: float = Field(default=3e-4, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = Field(default=None, gt=0, description="limit of the gradient's norm")
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="decay of the averaged weights, which become the result"
    )
    mixed_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = Field(default=False, description="compile the network (pays on a GPU)")
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=50, ge=1)
    validate_every: int = Field(default=1000, ge=1)
    preview_every: int = Field(default=5000, ge=1)
    checkpoint_every: int = Field(default=1000, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1, description="how many of the newest checkpoints stay, with the best")
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="end after so many validations without a better one, with the best weights"
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be fewer than steps ({self.steps})")
        return self

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class AuxiliaryNetwork:
    """A second network, trained beside the first by an optimizer of its own; no part of the result."""

    name: str  # of its loss in the log
    objective: nn.Module  # what `Stage.auxiliary_batch` gives → (loss to minimise, other terms by name)
    learning_rate: float  # at its peak; it follows the schedule of the first network's
    betas: tuple[float, float]
    start: int = 0  # the step from which it is trained


class Stage(ABC):
    """What differs between training an autoencoder and training a prior.

    Constructing one seeds torch with the training seed before it builds the network, so the same config starts from the
    same weights.
    """

    name: str  # for people: "autoencoder", "prior-top"
    training_data: MapDataset
    curves: dict[str, list[str]]  # panels of the curve picture: title → names of logged values

    monitor: str  # the value of `validate` that tells better networks from worse, lower is better

    objective: nn.Module  # around the network: batch on the device → (loss to minimise, other terms by name)
    auxiliary: AuxiliaryNetwork | None = None

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The network itself, whose weights are averaged and saved."""

    @abstractmethod
    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Values of the network over the whole validation split, the same on every process."""

    @abstractmethod
    def preview(self, path: Path) -> None:
        """Write a picture in which a person sees how far training is."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the network's weights with what they were made from."""

    def before_update(self, step: int) -> None:
        """Called before every update of the weights with the step's number, from 0; most stages have nothing to do."""

    def auxiliary_batch(self) -> Any:
        """What the auxiliary learns from: something that the objective keeps of the batch it has just seen."""

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after every update of the weights, with their optimizer; most stages have nothing to do."""

    def training_warnings(self, entries: Sequence[Mapping[str, float]]) -> list[str]:
        """What the log, its entries in order, warns of at the end of training."""
        return []

    def gathered(self) -> dict[str, float]:
        """What the stage itself has gathered since the last call, for the log; every process asks for it."""
        return {}

    def pending(self) -> dict[str, Any]:
        """What it has gathered by now, as JSON, for a checkpoint; every process asks for it."""
        return {}

    def resume(self, pending: dict[str, Any]) -> None:
        """Go on gathering from what `pending` gave."""


@dataclass(frozen=True)
class TrainableUnit:
    """An objective and its optimizer, as Accelerate wraps them."""

    loss: str  # its name in the log
    objective: nn.Module
    optimizer: AcceleratedOptimizer
    pace: float  # its learning rate over the first one's
    start: int


def train(stage: Stage, config: TrainingConfig, folder: Path, num_workers: int) -> dict[str, Any]:
    """Train until `config.steps`, from the newest checkpoint in `folder`; the last validation's values and the time."""
    accelerator = make_accelerator(config.mixed_precision, folder, config.gradient_accumulation_steps)
    units = _trainable_units(stage, config, accelerator)
    state = TrainingState(stage.trained, _optimized(stage, units), config.ema_decay, accelerator.scaler)
    checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
    history = MetricLog(folder, accelerator.is_main_process)
    if checkpoints.restore(state):
        accelerator.print(f"{stage.name}: going on from step {state.step:,} of {config.steps:,}")
        stage.resume(state.unlogged["stage"])
    history.resume(state.step, state.unlogged["terms"])
    started = time.monotonic() - state.seconds
    with StopSignals() as signals, _progress(stage.name, state.step, config.steps, accelerator) as bar:
        ended = state.step == config.steps or _exhausted(state, config)
        for step, batches in () if ended else _steps(stage, config, accelerator, state.step, num_workers):
            seed_step(config.seed, step, accelerator.process_index)
            terms = _update(stage, units, batches, config, step, accelerator, checkpoints)
            state.advance(time.monotonic() - started)
            bar.update()
            done = state.step
            history.gather(terms)
            if done % config.log_every == 0 or done == config.steps:
                shown = history.log(done, "train", {"learning_rate": config.rate(step)} | stage.gathered())
                accelerator.log(shown, step=done)
                bar.set_postfix_str(f"loss {shown['train/loss']:.4f}")
            better = False
            if done % config.validate_every == 0 or done == config.steps:
                with state.averaged():
                    state.last_validation = stage.validate(accelerator)
                accelerator.log(history.write(done, "validation", state.last_validation), step=done)
                better = state.record_validation(state.last_validation[stage.monitor])
            ended = done == config.steps or _exhausted(state, config)
            if accelerator.is_main_process and (done % config.preview_every == 0 or ended):
                with state.averaged():
                    stage.preview(folder / "previews" / f"{done:08d}.png")
                history.draw(folder / "curves.png", stage.curves, stage.name)
            stop = signals.received(accelerator)
            if done % config.checkpoint_every == 0 or better or ended or stop:
                state.unlogged = {"terms": history.gathered, "stage": stage.pending()}
                if accelerator.is_main_process:
                    checkpoints.save(state)
                accelerator.wait_for_everyone()
            if stop:
                raise Stopped(
                    f"{stage.name}: stopped by {stop.name} at step {done:,}; a checkpoint is saved, "
                    "and the same command goes on from it",
                    stop.value,
                )
            if ended:
                break
    if config.early_stopping_patience:
        checkpoints.restore_best(state)
    for warning in stage.training_warnings(history.entries):
        accelerator.print(f"warning: {warning}")
    summary = {"steps": state.step, "seconds": round(state.seconds, 1), "validation": state.last_validation}
    if accelerator.is_main_process:
        files.write_json(folder / "summary.json", summary)
        with state.averaged():
            stage.save(folder / "model.safetensors")  # last: with this file the stage counts as finished
    for tracker in accelerator.trackers:  # not `end_training`, which parts the processes: more stages may follow
        tracker.finish()
    accelerator.wait_for_everyone()
    return summary


def _exhausted(state: TrainingState, config: TrainingConfig) -> bool:
    return config.early_stopping_patience is not None and state.bad_validations >= config.early_stopping_patience


def make_accelerator(
    mixed_precision: str = "fp32", folder: Path | None = None, gradient_accumulation_steps: int = 1
) -> Accelerator:
    """Accelerate's handle on devices and processes, with a TensorBoard log in `folder`/logs."""
    # Accelerate keeps one precision for the life of a process; the stages of a run may each have their own.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # without which processes without GPUs would not find each other
        mixed_precision="no" if mixed_precision == "fp32" else mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with="tensorboard" if folder else None,
        project_dir=folder,
    )
    if folder:
        accelerator.init_trackers("logs")
    return accelerator


def seed_step(seed: int, step: int, process: int) -> None:
    """Make the random numbers of a step (dropout) a function of these three."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0]))


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch of tensors, in tuples or named tuples, moved to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    moved = [to_device(part, device) for part in batch]
    return type(batch)(*moved) if hasattr(batch, "_fields") else tuple(moved)


def _steps(
    stage: Stage, config: TrainingConfig, accelerator: Accelerator, start: int, num_workers: int
) -> Iterator[tuple[int, list[Any]]]:
    """Each step's number, from 0, with its micro-batches."""
    order = ResumableBatchSampler(
        len(stage.training_data),
        config.batch_size,
        start=start,
        stop=config.steps,
        seed=config.seed,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    micro = load_batches(stage.training_data, order, num_workers, pin_memory=accelerator.device.type == "cuda")
    for step in range(start, config.steps):
        yield step, [to_device(next(micro), accelerator.device) for _ in range(config.gradient_accumulation_steps)]


def _trainable_units(stage: Stage, config: TrainingConfig, accelerator: Accelerator) -> list[TrainableUnit]:
    """The stage's objective, and its auxiliary where it has one, ready to be trained."""
    units = []
    first = AuxiliaryNetwork("loss", stage.objective, config.learning_rate, config.betas)
    for index, each in enumerate([first, stage.auxiliary] if stage.auxiliary else [first]):
        optimizer = torch.optim.AdamW(
            each.objective.parameters(),
            lr=each.learning_rate,
            betas=each.betas,
            weight_decay=0 if index else config.weight_decay,
            fused=True,
        )
        module = torch.compile(each.objective) if config.compile else each.objective
        wrapped, optimizer = accelerator.prepare(module, optimizer)
        units.append(
            TrainableUnit(each.name, wrapped, optimizer, each.learning_rate / config.learning_rate, each.start)
        )
    return units


def _optimized(stage: Stage, units: Sequence[TrainableUnit]) -> dict[str, Optimized]:
    """What checkpoints hold, by prefix."""
    objectives = {"": stage.objective} | (
        {f"{stage.auxiliary.name}-": stage.auxiliary.objective} if stage.auxiliary else {}
    )
    return {
        prefix: Optimized(objective, unit.optimizer.optimizer)
        for (prefix, objective), unit in zip(objectives.items(), units, strict=True)
    }


def _update(
    stage: Stage,
    units: Sequence[TrainableUnit],
    batches: list[Any],
    config: TrainingConfig,
    step: int,
    accelerator: Accelerator,
    checkpoints: Checkpoints,
) -> dict[str, float]:
    """One update of the weights; the mean of each loss term over its micro-batches."""
    stage.before_update(step)
    units = [unit for unit in units if step >= unit.start]
    sums: dict[str, Tensor] = {}
    for batch in batches:
        with accelerator.accumulate(*(unit.objective for unit in units)), accelerator.autocast():
            for index, unit in enumerate(units):
                loss, terms = unit.objective(stage.auxiliary_batch() if index else batch)
                accelerator.backward(loss)
                for name, term in ({unit.loss: loss} | terms).items():
                    sums[name] = sums.get(name, 0) + term.detach().float() / len(batches)
    means = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    _check_finite(means, step, checkpoints)
    for index, unit in enumerate(units):
        if config.max_grad_norm:
            norm = accelerator.clip_grad_norm_(unit.objective.parameters(), config.max_grad_norm)
            name = f"gradient_norm_{unit.loss}" if index else "gradient_norm"
            means[name] = float(norm if norm is not None else math.nan)
        for group in unit.optimizer.param_groups:
            group["lr"] = unit.pace * config.rate(step)
        unit.optimizer.step()
        unit.optimizer.zero_grad()
    stage.after_update(units[0].optimizer.optimizer)
    return means


def _check_finite(means: dict[str, float], step: int, checkpoints: Checkpoints) -> None:
    for name, value in means.items():
        if not math.isfinite(value):
            good = checkpoints.newest()
            where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            raise UserError(
                f"step {step + 1}: the loss term `{name}` is {value}; {where}; "
                "lower the learning rate, set max_grad_norm, or use mixed_precision bf16 instead of fp16"
            )


def _progress(name: str, start: int, stop: int, accelerator: Accelerator) -> tqdm:
    return tqdm(
        desc=name,
        initial=start,
        total=stop,
        unit="step",
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
        mininterval=0.5,
        smoothing=0.05,
    )

"""The training loop of all stages.

A stage provides data, objective and previews. The loop provides devices, mixed precision, gradient accumulation,
clipping, the learning-rate schedule, weight averaging, validation, logs, checkpoints and exact resume. Progress counts
in steps: one update of the weights from one global batch. Random numbers of a step depend on (seed, step, process)
only, so that resuming from any checkpoint gives the same result.

The host enqueues steps without waiting for the device. Loss terms stay on the device, and are read and checked for NaN
where the loop waits anyway: for log entries, validation, previews and checkpoints.

A stage may train an auxiliary network against the first. Both gradients of a step are computed at the weights at its
beginning, so that accumulated batches and several processes give the same result as one batch.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from tqdm import tqdm

from train.accelerator import fast_kernels, log_preview, make_accelerator, seed_step, to_device
from train.checkpoints import Checkpoints, Optimized, TrainingState
from train.early_stopping import EarlyStopping
from train.ema import ExponentialMovingAverage, copy_tensors
from train.lr_schedule import learning_rate
from train.metric_log import MetricLog, StepValues
from train.signals import StopSignals
from vqvae2 import files
from vqvae2.data.samplers import MapDataset, ResumableBatchSampler, load_batches
from vqvae2.errors import Stopped, UserError
from vqvae2.run_folder import StageFolder
from vqvae2.training_config import Tracker, TrainingConfig

_GRADIENT_NORM = "gradient_norm"  # name in the log, followed by the name of an auxiliary network if it is its norm


@dataclass(frozen=True)
class AuxiliaryNetwork:
    """A second network, trained with its own optimizer. It is not part of the result."""

    name: str  # of its loss in the log
    objective: nn.Module  # TrainingStage.auxiliary_batch() → (loss, other terms by name)
    learning_rate: float  # at the peak; the schedule is that of the main network
    betas: tuple[float, float]
    start: int = 0  # first step that trains it


NetworkT = TypeVar("NetworkT", bound=nn.Module)
ObjectiveT = TypeVar("ObjectiveT", bound=nn.Module)


class TrainingStage(ABC, Generic[NetworkT, ObjectiveT]):
    """What differs between training an autoencoder and training a prior.

    The constructor seeds torch with the training seed before it builds the network, so that the same config starts from
    the same weights.
    """

    name: str  # "autoencoder", "prior-top"
    training_data: MapDataset
    curves: dict[str, list[str]]  # panels of curves.png: title → names of logged values
    monitor: str  # value of `validate` that selects the best weights, lower is better
    network: NetworkT  # its weights are averaged and saved
    objective: ObjectiveT  # wraps the network: batch on the device → (loss, other terms by name)
    auxiliary: AuxiliaryNetwork | None = None
    embedding_learning_rate: float | None = None  # at the peak; that of the config if None
    made_from: Mapping[str, Any] = MappingProxyType({})  # digests of the artifacts that training reads
    find_unused_parameters = False  # of DDP: whether some steps train only a part of the network

    @abstractmethod
    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return metrics over the whole validation split, the same on every process."""

    @abstractmethod
    def preview(self, path: Path) -> None:
        """Write a picture that shows the progress of training."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the network's weights, and the digests of what they were made from."""

    def before_update(self, step: int) -> None:
        """Do something before the update of each step, counted from 0."""

    def auxiliary_batch(self) -> Any:
        """Return the batch for the auxiliary network, which the objective kept from its last call."""

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Do something after the update of each step."""

    def training_warnings(self, entries: Sequence[Mapping[str, float]]) -> list[str]:
        """Return warnings about the log entries at the end of training."""
        return []

    def logged_values(self) -> dict[str, float]:
        """Return values gathered since the last call, for the log. Every process must call this."""
        return {}

    def pending_values(self) -> dict[str, Any]:
        """Return values gathered so far as JSON, for a checkpoint. Every process must call this."""
        return {}

    def restore_pending(self, pending: dict[str, Any]) -> None:
        """Restore what `pending_values` returned."""


@dataclass(frozen=True)
class TrainableUnit:
    """An objective and its optimizer, wrapped by Accelerate."""

    loss: str  # name of the loss in the log
    objective: nn.Module
    optimizer: AcceleratedOptimizer
    start: int


def train(
    stage: TrainingStage, config: TrainingConfig, path: Path, num_workers: int, tracker: Tracker = "tensorboard"
) -> dict[str, Any]:
    """Train up to `config.steps`, or resume from the most recent checkpoint in `path`.

    Returns:
        The summary: steps, seconds and the last validation.
    """
    folder = StageFolder(path)
    accelerator = make_accelerator(
        config.mixed_precision, path, config.gradient_accumulation_steps, stage.find_unused_parameters, tracker
    )
    units = _make_units(stage, config, accelerator)
    ema = ExponentialMovingAverage(stage.network, config.ema_decay)
    early_stopping = EarlyStopping(config.early_stopping_patience)
    state = TrainingState(_optimized(stage, units), ema, early_stopping, accelerator.scaler, dict(stage.made_from))
    checkpoints = Checkpoints(folder.checkpoints, config.keep_checkpoints)
    log = MetricLog(folder.metric_log, accelerator.is_main_process)
    if checkpoints.restore(state):
        accelerator.print(f"{stage.name}: resuming from step {state.step:,} of {config.steps:,}")
        stage.restore_pending(state.unlogged["stage"])
    log.resume(state.step, state.unlogged["terms"])
    started = time.monotonic() - state.seconds
    with (
        fast_kernels(accelerator.device),
        StopSignals(accelerator) as signals,
        _progress_bar(stage.name, state.step, config.steps, accelerator) as bar,
    ):
        finished = state.step == config.steps or early_stopping.should_stop
        for step, batches in () if finished else _batches(stage, config, accelerator, state.step, num_workers):
            seed_step(config.seed, step, accelerator.process_index)
            if 0 < step == config.phase(step)[0]:
                _start_phase(units[0], ema)
            log.add(_update(stage, units, batches, config, step, accelerator))
            state.advance(time.monotonic() - started)
            bar.update()
            done, last = state.step, state.step == config.steps
            if last or any(done % interval == 0 for interval in config.intervals):
                _check_terms(log, stage.name, config, checkpoints)
            if done % config.log_every == 0 or last:
                extra = {"learning_rate": learning_rate(config, step)} | stage.logged_values()
                shown = log.write_means(done, "train", extra)
                accelerator.log(shown, step=done)
                bar.set_postfix_str(f"loss {shown['train/loss']:.4f}")
            improved = False
            if done % config.validate_every == 0 or last:
                with ema.applied():
                    state.last_validation = stage.validate(accelerator)
                accelerator.log(log.write(done, "validation", state.last_validation), step=done)
                improved = early_stopping.update(done, state.last_validation[stage.monitor])
            finished = last or early_stopping.should_stop
            if accelerator.is_main_process and (done % config.preview_every == 0 or finished):
                with ema.applied():
                    stage.preview(folder.preview(done))
                log_preview(accelerator, folder.preview(done), done)
                log.plot(folder.curves, stage.curves, stage.name)
            stop = signals.received()
            if done % config.checkpoint_every == 0 or improved or finished or stop:
                _check_terms(log, stage.name, config, checkpoints)
                state.unlogged = {"terms": log.pending, "stage": stage.pending_values()}
                _save(state, stage.name, config, checkpoints, accelerator)
            if stop:
                message = f"{stage.name}: stopped by {stop.name} at step {done:,}; a checkpoint is saved; "
                raise Stopped(message + "run the same command again to resume", stop.value)
            if finished:
                break
    if config.early_stopping_patience:
        checkpoints.restore_best(state)
    for warning in stage.training_warnings(log.entries):
        accelerator.print(f"warning: {warning}")
    return _finish(stage, state, folder, accelerator)


def _finish(
    stage: TrainingStage, state: TrainingState, folder: StageFolder, accelerator: Accelerator
) -> dict[str, Any]:
    """Write the summary and the weights, and return the summary."""
    summary = {"steps": state.step, "seconds": round(state.seconds, 1), "validation": state.last_validation}
    if accelerator.is_main_process:
        files.write_json(folder.summary, summary)
        with state.ema.applied():
            stage.save(folder.weights)  # last, because the stage counts as complete once this file exists
    for tracker in accelerator.trackers:  # not `end_training`, which disconnects processes that later stages need
        tracker.finish()
    accelerator.wait_for_everyone()
    return summary


def _batches(
    stage: TrainingStage, config: TrainingConfig, accelerator: Accelerator, start: int, num_workers: int
) -> Iterator[tuple[int, list[Any]]]:
    """Yield each step, counted from 0, with its micro-batches on the device."""
    sampler = ResumableBatchSampler(
        len(stage.training_data),
        config.batch_size,
        start=start,
        stop=config.steps,
        seed=config.seed,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    micro_batches = load_batches(
        stage.training_data, sampler, num_workers, pin_memory=accelerator.device.type == "cuda"
    )
    count = config.gradient_accumulation_steps
    for step in range(start, config.steps):
        yield step, [to_device(next(micro_batches), accelerator.device) for _ in range(count)]


def _make_units(stage: TrainingStage, config: TrainingConfig, accelerator: Accelerator) -> list[TrainableUnit]:
    """Return the stage's objective, and its auxiliary network if any, with optimizers."""
    units = []
    main = AuxiliaryNetwork("loss", stage.objective, config.learning_rate, config.betas)
    for index, each in enumerate([main, stage.auxiliary] if stage.auxiliary else [main]):
        optimizer = torch.optim.AdamW(
            _parameter_groups(each.objective, each.learning_rate, None if index else stage.embedding_learning_rate),
            lr=each.learning_rate,
            betas=each.betas,
            weight_decay=0 if index else config.weight_decay,
            fused=True,
        )
        module = torch.compile(each.objective) if config.compile else each.objective
        wrapped, optimizer = accelerator.prepare(module, optimizer)
        units.append(TrainableUnit(each.name, wrapped, optimizer, each.start))
    return units


def _parameter_groups(
    objective: nn.Module, learning_rate: float, embedding_learning_rate: float | None
) -> list[dict[str, Any]]:
    """Return the parameters for an optimizer, in the order of the objective, with the peak of their learning rate."""
    modules = [module for module in objective.modules() if isinstance(module, nn.Embedding)]
    peaks = {parameter: embedding_learning_rate for module in modules for parameter in module.parameters()}
    groups = groupby(objective.parameters(), lambda parameter: peaks.get(parameter) or learning_rate)
    return [{"params": list(parameters), "peak_learning_rate": peak} for peak, parameters in groups]


def _optimized(stage: TrainingStage, units: Sequence[TrainableUnit]) -> dict[str, Optimized]:
    """Return what checkpoints contain, by prefix."""
    modules = {"": stage.objective}
    if stage.auxiliary:
        modules[f"{stage.auxiliary.name}-"] = stage.auxiliary.objective
    return {
        prefix: Optimized(module, unit.optimizer.optimizer)
        for (prefix, module), unit in zip(modules.items(), units, strict=True)
    }


def _start_phase(unit: TrainableUnit, ema: ExponentialMovingAverage) -> None:
    """Start another phase of training from the averaged weights, if any, so that those which it freezes stay as saved.

    The moments of the phase before are too small for a loss with further terms, and start at zero.
    """
    unit.optimizer.optimizer.state.clear()
    copy_tensors(dict(ema.network.named_parameters()), ema.average)


def _update(
    stage: TrainingStage,
    units: Sequence[TrainableUnit],
    batches: list[Any],
    config: TrainingConfig,
    step: int,
    accelerator: Accelerator,
) -> StepValues:
    """Update the weights once, and return the mean of each loss term over the micro-batches, and gradient norms."""
    stage.before_update(step)
    units = [unit for unit in units if step >= unit.start]
    names: list[str] = []
    sums: Tensor | float = 0.0
    for batch in batches:
        terms: dict[str, Tensor] = {}
        with accelerator.accumulate(*(unit.objective for unit in units)), accelerator.autocast():
            for index, unit in enumerate(units):
                loss, others = unit.objective(stage.auxiliary_batch() if index else batch)
                accelerator.backward(loss)
                terms |= {unit.loss: loss} | others
        names = list(terms)
        sums = sums + torch.stack([term.detach().float() for term in terms.values()]) / len(batches)
    values = [torch.as_tensor(sums)]
    for index, unit in enumerate(units):
        if config.max_grad_norm:
            norm = accelerator.clip_grad_norm_(unit.objective.parameters(), config.max_grad_norm)
            assert norm is not None, "only DeepSpeed returns none"
            names.append(f"{_GRADIENT_NORM}_{unit.loss}" if index else _GRADIENT_NORM)
            values.append(norm[None])
        for group in unit.optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"] / config.learning_rate * learning_rate(config, step)
        unit.optimizer.step()
        unit.optimizer.zero_grad()
    stage.after_update(units[0].optimizer.optimizer)
    return StepValues(step + 1, tuple(names), torch.cat(values))


def _check_terms(log: MetricLog, stage: str, config: TrainingConfig, checkpoints: Checkpoints) -> None:
    """Read the loss terms of the steps since the last call from the device.

    Raises:
        UserError: If one is NaN or infinite.
    """
    for step, values in log.read():
        for name, value in values.items():
            # Mixed precision with fp16 skips the steps with infinite gradients.
            if not math.isfinite(value) and not name.startswith(_GRADIENT_NORM):
                raise _diverged(stage, config, step, f"the loss term `{name}` is {value}", checkpoints)


def _save(
    state: TrainingState, stage: str, config: TrainingConfig, checkpoints: Checkpoints, accelerator: Accelerator
) -> None:
    """Write a checkpoint from the main process.

    Raises:
        UserError: If a tensor is not finite.
    """
    if name := state.non_finite():  # on every process, so that all of them stop
        raise _diverged(stage, config, state.step, f"`{name}` is not finite after the update", checkpoints)
    if accelerator.is_main_process:
        checkpoints.save(state)
    accelerator.wait_for_everyone()


def _diverged(stage: str, config: TrainingConfig, step: int, problem: str, checkpoints: Checkpoints) -> UserError:
    newest = checkpoints.newest()
    where = f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
    advice = ["Lower the learning rate"]
    if not config.max_grad_norm:
        advice.append("set max_grad_norm")
    if config.mixed_precision == "fp16":
        advice.append("use mixed_precision bf16 instead of fp16")
    return UserError(f"{stage}: step {step}: {problem}; {where}. {' or '.join(advice)}.")


def _progress_bar(name: str, start: int, stop: int, accelerator: Accelerator) -> tqdm:
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

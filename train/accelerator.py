"""Accelerate's handle on devices and processes, and moving batches to the device."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from sampling.processes import accelerate_errors
from vqvae2.errors import UserError


def make_accelerator(
    mixed_precision: str = "fp32",
    folder: Path | None = None,
    gradient_accumulation_steps: int = 1,
    find_unused_parameters: bool = False,
) -> Accelerator:
    """Return an Accelerator that logs to TensorBoard in `folder`/logs, if a folder is given.

    With `find_unused_parameters`, DDP allows steps in which a part of the parameters has no gradients.
    """
    _check_environment(mixed_precision, gradient_accumulation_steps)
    if folder and str(folder) != str(folder).encode(errors="replace").decode():
        raise UserError(f"{folder}: TensorBoard cannot log to a name that is not valid UTF-8. Choose another folder.")
    # Accelerate keeps one precision per process, but each stage of a run may have its own.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    with accelerate_errors():
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # required for processes without GPUs to find each other
            mixed_precision="no" if mixed_precision == "fp32" else mixed_precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            log_with="tensorboard" if folder else None,
            project_dir=folder,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
        )
    if folder:
        accelerator.init_trackers("logs")
    return accelerator


def _check_environment(mixed_precision: str, gradient_accumulation_steps: int) -> None:
    """Refuse launcher settings that Accelerate would silently prefer to, or ignore in favor of, the config."""
    settings = {
        "ACCELERATE_MIXED_PRECISION": ("training.mixed_precision", {"", "no", mixed_precision}),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            "training.gradient_accumulation_steps",
            {"", "1", str(gradient_accumulation_steps)},
        ),
    }
    for name, (key, allowed) in settings.items():
        value = os.environ.get(name, "")
        if value not in allowed:
            raise UserError(f"{name}={value}: differs from {key}. Unset the variable, and set {key} instead.")
        os.environ.pop(name, None)
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(name, "").lower() not in ("", "0", "f", "false", "n", "no", "off"):
            raise UserError(f"{name}={os.environ[name]}: only data-parallel training is supported. Unset the variable.")
        os.environ.pop(name, None)


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed torch for one step, so that dropout is a function of the seed, the step and the process."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0]))


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a tensor, or a tuple or named tuple of tensors, to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    moved = [to_device(part, device) for part in batch]
    return type(batch)(*moved) if hasattr(batch, "_fields") else tuple(moved)

"""Accelerate's handle on devices, processes and experiment trackers, and moving batches to the device."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import MLflowTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from sampling.processes import accelerate_errors
from vqvae2.data.images import to_rgb
from vqvae2.data.samplers import MapDataset, SequentialBatchSampler, load_batches
from vqvae2.errors import UserError
from vqvae2.pictures import load_image, to_pil
from vqvae2.training_config import Tracker


def make_accelerator(
    mixed_precision: str = "fp32",
    folder: Path | None = None,
    gradient_accumulation_steps: int = 1,
    find_unused_parameters: bool = False,
    tracker: Tracker = "none",
) -> Accelerator:
    """Return an Accelerator that logs the training in a stage's `folder` to a tracker.

    With `find_unused_parameters`, DDP allows steps in which a part of the parameters has no gradients.

    Raises:
        UserError: If the package of the tracker is missing, or the environment contradicts the arguments.
    """
    _check_environment(mixed_precision, gradient_accumulation_steps)
    if tracker in ("wandb", "mlflow") and importlib.util.find_spec(tracker) is None:
        raise UserError(f"tracker: the package {tracker} is not installed. Install it: pip install {tracker}")
    if tracker == "tensorboard" and str(folder) != str(folder).encode(errors="replace").decode():
        raise UserError(f"{folder}: TensorBoard cannot log to a name that is not valid UTF-8. Choose another folder.")
    # Accelerate keeps one precision per process, but each stage of a run may have its own.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    with accelerate_errors():
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # required for processes without GPUs to find each other
            mixed_precision="no" if mixed_precision == "fp32" else mixed_precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            log_with=None if tracker == "none" else tracker,
            project_dir=folder,
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    find_unused_parameters=find_unused_parameters,
                    gradient_as_bucket_view=True,  # saves a copy of all gradients
                    broadcast_buffers=False,  # codebooks are updated from all-reduced statistics, the same on all ranks
                )
            ],
        )
    if folder and tracker == "tensorboard":
        accelerator.init_trackers("logs")  # the name of the folder in `folder`
    elif folder and tracker != "none":
        run, name = folder.parent.name, f"{folder.parent.name}/{folder.name}"
        options = {"wandb": {"group": run, "name": name, "dir": str(folder)}, "mlflow": {"run_name": name}}
        try:
            accelerator.init_trackers("vqvae2", init_kwargs={tracker: options[tracker]})
        except Exception as error:  # each tracker has its own
            reason = " ".join(str(error).split())
            raise UserError(f"tracker: {tracker} cannot start ({reason}). Fix it, or use another tracker.") from error
    return accelerator


@contextlib.contextmanager
def fast_kernels(device: torch.device) -> Iterator[None]:
    """Inside the block, let CUDA use TF32 and the fastest convolution of each size.

    The settings end with the block, because sampled images depend on them.
    """
    if device.type != "cuda":
        yield
        return
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark


def log_preview(accelerator: Accelerator, path: Path, step: int) -> None:
    """Log a picture to the tracker, if the stage has written one."""
    if not path.is_file():
        return
    for tracker in accelerator.trackers:
        if isinstance(tracker, TensorBoardTracker):
            tracker.log_images({"preview": to_rgb(load_image(path)[None]).numpy()}, step, dataformats="NCHW")
        elif isinstance(tracker, WandBTracker):
            tracker.log_images({"preview": [to_pil(load_image(path))]}, step)
        elif isinstance(tracker, MLflowTracker):
            tracker.log_artifact(str(path), "previews")


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


def shared_batches(data: MapDataset, batch_size: int, accelerator: Accelerator, num_workers: int = 0) -> Iterator[Any]:
    """Yield this process's part of the batches of a whole data set, on the device."""
    sampler = SequentialBatchSampler(len(data), batch_size, accelerator.process_index, accelerator.num_processes)
    for batch in load_batches(data, sampler, num_workers):
        yield to_device(batch, accelerator.device)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move a tensor, or a tuple or named tuple of tensors, to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    moved = [to_device(part, device) for part in batch]
    return type(batch)(*moved) if hasattr(batch, "_fields") else tuple(moved)

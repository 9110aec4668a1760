"""Measure training steps and sampling of configs on a GPU: time, images per second, host waits, peak memory.

    python -m benchmarks.gpu_check configs/ffhq256.yaml configs/imagenet256-base.yaml
    python -m benchmarks.gpu_check configs/demo.yaml --device cpu --steps 1    # checks only this program

Weights are random and batches are zeros. `pytest -m cuda` compares results with those of a CPU, and
`python -m benchmarks.memory` computes the peak memory to compare with.
"""

import gc
import itertools
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from tyro.conf import Positional

from benchmarks.interleaved import peak_memory
from benchmarks.memory import build_stage, gpus_in_header, micro_batch_of, stages_of
from sampling.params import LevelSamplingParams
from sampling.run_config import RunConfig
from sampling.sample_level import Noise, sample_level
from train.accelerator import to_device
from vqvae2.command_line import Options, run_command
from vqvae2.priors import Prior
from vqvae2.training_config import TrainingConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class CheckOptions(Options):
    """Print two tables: training steps, and sampling of each level."""

    configs: Positional[tuple[Path, ...]] = Field(min_length=1, description="YAML files")
    device: str = Field(default="cuda", description="device of PyTorch")
    steps: int = Field(default=5, ge=1, description="measured steps")
    compiled: bool = Field(default=True, description="measure also with torch.compile")
    batches: tuple[int, ...] = Field(default=(1, 16, 64), description="batch sizes of sampling")
    dtypes: tuple[Literal["fp32", "bf16"], ...] = Field(default=("fp32", "bf16"), description="weights of sampling")


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mean_seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the mean time of a call, after two calls that are not measured."""
    for _ in range(2):
        work()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def host_waits(work: Callable[[], object], device: torch.device) -> int:
    """Return how many operations of a call make the host wait for the GPU."""
    if device.type != "cuda":
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        work()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def make_step(objective: nn.Module, batch: Any, training: TrainingConfig, device: torch.device) -> Callable[[], None]:
    """Return an optimizer step without gradient accumulation, on a batch that is on the device."""
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-4, fused=True)
    dtype = _DTYPES[training.mixed_precision]

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, _ = objective(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def check_training(path: Path, options: CheckOptions) -> None:
    """Print one row per network, with and without compilation."""
    config, device = RunConfig.from_yaml(path), torch.device(options.device)
    for name, training in stages_of(config).items():
        for compiled in (False, True) if options.compiled else (False,):
            size = micro_batch_of(training, gpus_in_header(path))
            cells = [path.stem, name, str(size), training.mixed_precision, "yes" if compiled else "no"]
            try:
                cells += training_row(config, name, compiled, size, options.steps, device)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                cells += [f"{type(error).__name__}: {str(error).splitlines()[0][:120]}", "", "", ""]
            print(f"| {' | '.join(cells)} |", flush=True)
            gc.collect()
            torch.cuda.empty_cache()


def training_row(
    config: RunConfig, name: str, compiled: bool, size: int, steps: int, device: torch.device
) -> list[str]:
    """Return time, images per second, host waits and peak memory of a step."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    objective, network, batch = build_stage(config, name, size)
    if isinstance(network, Prior):
        network.gradient_checkpointing = getattr(stages_of(config)[name], "gradient_checkpointing", False)
    objective.to(device).train()
    if compiled:
        objective.compile()
    step = make_step(objective, to_device(batch, device), stages_of(config)[name], device)
    seconds = mean_seconds(step, steps, device)
    waits = host_waits(step, device)
    return [f"{seconds * 1e3:.1f}", f"{size / seconds:.0f}", str(waits), f"{peak_memory(device) / 2**30:.1f}"]


def check_sampling(path: Path, options: CheckOptions) -> None:
    """Print one row per level, batch size and data type."""
    config, device = RunConfig.from_yaml(path), torch.device(options.device)
    for level in config.levels:
        torch.manual_seed(0)
        _, prior, _ = build_stage(config, f"prior-{level}", 1)
        assert isinstance(prior, Prior)
        prior.eval().requires_grad_(False).to(device)
        for batch, dtype in itertools.product(options.batches, options.dtypes):
            seconds = sampling_seconds(prior, batch, LevelSamplingParams(dtype=dtype), device)
            rate = batch * prior.spec.level.height * prior.spec.level.width / seconds
            print(f"| {path.stem} | {level} | {batch} | {dtype} | {seconds:.2f} | {rate:.0f} |", flush=True)


def sampling_seconds(prior: Prior, batch: int, params: LevelSamplingParams, device: torch.device) -> float:
    """Return the time of the second of two batches."""
    coarser = tuple(torch.zeros(batch, *each.shape, dtype=torch.int64, device=device) for each in prior.spec.coarser)
    started = 0.0
    for _ in range(2):
        synchronize(device)
        started = time.perf_counter()
        sample_level(prior, Noise(0, range(batch), 0), params, coarser)
        synchronize(device)
    return time.perf_counter() - started


def main(options: CheckOptions) -> None:
    """Print both tables."""
    print("| config | network | batch | precision | compiled | ms per step | images/s | host waits | peak (GiB) |")
    print("|---|---|---|---|---|---|---|---|---|")
    for path in options.configs:
        check_training(path, options)
    print("\n| config | level | batch | weights | s | codes/s |\n|---|---|---|---|---|---|")
    for path in options.configs:
        check_sampling(path, options)


if __name__ == "__main__":
    import sys

    run_command(main, sys.argv[1:], "python -m benchmarks.gpu_check")

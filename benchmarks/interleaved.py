"""Timing shared by the benchmarks: repeated calls, and variants measured alternately in separate processes."""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Generic, NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Timing(NamedTuple, Generic[T]):
    """Durations of repeated calls, and the value that the last call returned."""

    seconds: list[float]
    value: T

    @property
    def median(self) -> float:
        """Median duration in seconds."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """Shortest duration in seconds."""
        return min(self.seconds)


def time_calls(
    function: Callable[[], T], repeats: int = 1, clock: Callable[[], float] = time.perf_counter
) -> Timing[T]:
    """Call `function` `repeats` times, and time each call: wall time, or CPU time with `clock=time.process_time`."""
    seconds: list[float] = []
    while True:
        started = clock()
        value = function()
        seconds.append(clock() - started)
        if len(seconds) >= repeats:
            return Timing(seconds, value)


class Measurement(NamedTuple):
    """Time and memory of one variant."""

    seconds: list[float]  # of each measured round
    memory: int  # peak in bytes

    @property
    def median(self) -> float:
        """Median duration of a round in seconds."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        spread = f"{min(self.seconds):.2f} to {max(self.seconds):.2f}"
        return f"{self.median:.2f} s ({spread}), peak memory {self.memory / 2**20:.0f} MiB"


def run_interleaved(
    worker: Callable[..., None], variants: dict[str, tuple[Any, ...]], rounds: int, warmup: int
) -> dict[str, Measurement]:
    """Measure variants alternately, round by round, so that other load on the machine affects all of them equally.

    Each variant runs `worker(pipe, *arguments)` in a process of its own, so that their peak memory is separate. The
    worker has to call `serve_steps`. The first `warmup` rounds are not measured.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    for name, arguments in variants.items():
        pipes[name], child = context.Pipe()
        context.Process(target=worker, args=(child, *arguments), daemon=True).start()
        child.close()  # so that `recv` raises EOFError if the process dies
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(warmup + rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    measurements = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        measurements[name] = Measurement(seconds[name][warmup:], pipe.recv())
    return measurements


def serve_steps(pipe: Connection, step: Callable[[], object], device: torch.device, baseline: int = 0) -> None:
    """Run and time one step per request of `run_interleaved`; finally send the peak memory minus `baseline` bytes."""

    def synchronized_step() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    while pipe.recv():
        pipe.send(time_calls(synchronized_step).best)
    pipe.send(peak_memory(device) - baseline)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes, on the GPU if `device` is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

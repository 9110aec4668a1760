"""Two ways of doing the same, each in a process of its own, taking turns: a busy machine slows both alike."""

import multiprocessing
import statistics
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple


class Measurement(NamedTuple):
    """What one way took."""

    seconds: list[float]  # of each measured round
    memory: int  # bytes at the peak

    @property
    def median(self) -> float:
        """The median time of a round in seconds."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        least, most = min(self.seconds), max(self.seconds)
        return f"{self.median:.2f} s (from {least:.2f} to {most:.2f}), peak memory {self.memory / 2**20:.0f} MiB"


def run_interleaved(
    serve: Callable[..., None], ways: dict[str, tuple[Any, ...]], rounds: int, warm: int
) -> dict[str, Measurement]:
    """Run `serve(pipe, *arguments)` once for each way and ask it for `warm` unmeasured and `rounds` measured rounds.

    To each True it gets, `serve` answers with the seconds of one round; to False with its peak memory in bytes.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name, arguments in ways.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, *arguments), daemon=True).start()
        theirs.close()  # a process that fails then ends the other end too
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(warm + rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            times[name].append(pipe.recv())
    taken = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        taken[name] = Measurement(times[name][warm:], pipe.recv())
    return taken

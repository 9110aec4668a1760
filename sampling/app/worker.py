"""ServedModel: a pipeline whose calls run one at a time in one thread, and are canceled by session."""

import asyncio
import contextlib
import contextvars
import ctypes
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sampling.params import SamplingConfig
from sampling.pipeline import VQVAE2Pipeline

_Result = TypeVar("_Result")


class Canceled(Exception):
    """The session has canceled the job."""


class Job:
    """Progress of one model call, which other threads can cancel.

    Args:
        report: Called with the number of completed codes and the total.
    """

    def __init__(self, report: Callable[[int, int], object] = lambda done, total: None) -> None:
        self.canceled = threading.Event()
        self.done = self.total = 0
        self._report = report

    def start(self, total: int) -> None:
        """Set the number of codes to sample."""
        self.total = total
        self.advance(0)

    def advance(self, codes: int) -> None:
        """Count codes as completed.

        Raises:
            Canceled: If the job is canceled.
        """
        if self.canceled.is_set():
            raise Canceled
        self.done += codes
        self._report(self.done, self.total)


class ModelWorker:
    """One thread that runs the jobs of all sessions in the order of their submission.

    Call `run` and `cancel` from one event loop.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._jobs: defaultdict[str, dict[Job, Future[Any]]] = defaultdict(dict)

    async def run(self, session: str, job: Job, work: Callable[[Job], _Result]) -> _Result:
        """Return `work(job)`, called in the thread of the worker.

        Raises:
            Canceled: If the session cancels the job, while it waits or at its next call of `job.advance`.
        """
        # Gradio's progress bars find their event through context variables.
        future = self._executor.submit(contextvars.copy_context().run, _start, job, work)
        self._jobs[session][job] = future
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if job.canceled.is_set():
                raise Canceled from None
            job.canceled.set()  # the caller is canceled, which does not stop the thread
            raise
        finally:
            del self._jobs[session][job]
            if not self._jobs[session]:
                del self._jobs[session]

    def cancel(self, session: str) -> None:
        """Cancel all jobs of a session."""
        for job, future in self._jobs.get(session, {}).items():
            job.canceled.set()
            future.cancel()

    def close(self) -> None:
        """Cancel all jobs and stop the thread."""
        for session in list(self._jobs):
            self.cancel(session)
        self._executor.shutdown(cancel_futures=True)


def _start(job: Job, work: Callable[[Job], _Result]) -> _Result:
    job.advance(0)
    try:
        return work(job)
    finally:
        _release_memory()


def _release_memory() -> None:
    """Return freed memory to the system. The command line makes glibc keep it, for training."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # other C libraries
            ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class ServedModel:
    """A pipeline, with the settings that the page starts with."""

    name: str
    pipeline: VQVAE2Pipeline
    defaults: SamplingConfig
    worker: ModelWorker = field(default_factory=ModelWorker)

    @property
    def class_choices(self) -> list[tuple[str, int]]:
        """Names of the classes with their labels; empty for an unconditional model."""
        return [(name, label) for label, name in enumerate(self.pipeline.class_names)]

    def supports_guidance(self, level: int) -> bool:
        """Return whether the prior of a level, 0 for the finest, was trained for classifier-free guidance."""
        prior = self.pipeline.priors[level]
        return bool(prior.spec.num_classes and prior.made_from.get("label_dropout", 0))

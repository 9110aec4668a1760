"""Batch samplers whose order depends on the seed and the step only, so training can resume at any step.

The samples of all epochs, shuffled differently in each epoch, form one infinite sequence. Step s uses the global batch
[s · B, (s + 1) · B) of it. Each rank uses a contiguous part of the batch, so two ranks with batch size B see the same
samples in the same order as one.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Process, get_start_method, parent_process
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, dataloader, default_collate, get_worker_info

from vqvae2.errors import UserError

# If workers cannot be started, the destructor of DataLoader's iterator looks for this attribute, which is not set yet,
# and would print a traceback after our message.
dataloader._MultiProcessingDataLoaderIter._shutdown = True  # pyright: ignore[reportAttributeAccessIssue]

SampleKey = tuple[int, int]  # (index of the sample, seed of its augmentation)


class MapDataset(Protocol):
    """A data set with a length, indexed by integers, or by (index, augmentation seed) for training."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


class ResumableBatchSampler(Sampler[list[SampleKey]]):
    """Sampler of this rank's micro-batches from step `start` to step `stop`, as keys (index, augmentation seed).

    A step has `gradient_accumulation_steps` micro-batches. `batch_size` is the total of all ranks and micro-batches.

    >>> sampler = ResumableBatchSampler(num_samples=10, batch_size=4, start=3, stop=5)
    >>> [len(batch) for batch in sampler]
    [4, 4]

    Raises:
        UserError: If `batch_size` is not divisible by the number of micro-batches of all ranks.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        start: int,
        stop: int,
        seed: int = 0,
        gradient_accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % (world_size * gradient_accumulation_steps):
            raise UserError(
                f"batch_size: {batch_size} is not divisible by {world_size} processes × "
                f"{gradient_accumulation_steps} gradient accumulation steps"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.start, self.stop, self.gradient_accumulation_steps = start, stop, gradient_accumulation_steps
        self.rank, self.world_size = rank, world_size
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        rank_size = self.batch_size // self.world_size
        micro_size = rank_size // self.gradient_accumulation_steps
        for step in range(self.start, self.stop):
            first = step * self.batch_size + self.rank * rank_size
            for begin in range(first, first + rank_size, micro_size):
                yield self._keys(begin, begin + micro_size)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.gradient_accumulation_steps

    def _keys(self, first: int, stop: int) -> list[SampleKey]:
        """Return the keys at the positions from `first` to `stop` in the infinite sequence of samples."""
        indices: list[int] = []
        position = first
        while position < stop:
            epoch, offset = divmod(position, self.num_samples)
            if epoch != self._epoch:
                self._epoch = epoch
                self._permutation = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
            indices += self._permutation[offset : offset + stop - position].tolist()
            position = first + len(indices)
        return list(zip(indices, spawn_seeds(self.seed, first, stop).tolist(), strict=True))


def spawn_seeds(seed: int, first: int, stop: int) -> np.ndarray:
    """Return `SeedSequence((seed, n)).generate_state(1, np.uint64)[0]` for n from `first` to `stop`, as one vector.

    The hash is that of NumPy's `SeedSequence` (O'Neill 2015, "Developing a seed_seq alternative"), with a pool of four
    words of 32 bits.
    """
    numbers = np.arange(first, stop, dtype=np.uint64)
    if first >> 32 != (stop - 1) >> 32:  # the high word differs, and may be left out
        states = [np.random.SeedSequence((seed, int(n))).generate_state(1, np.uint64) for n in numbers]
        return np.concatenate(states) if states else numbers
    low, high = numbers.astype(np.uint32), (numbers >> np.uint64(32)).astype(np.uint32)
    words = [np.full_like(low, word) for word in ([seed & _WORD, seed >> 32] if seed >> 32 else [seed])]
    words += [low, high] if first >> 32 else [low]
    absorb = _Hash(0x43B0D7E5, 0x931E8875)
    pool = [absorb(word) for word in (words + [np.zeros_like(low)] * 4)[:4]]
    for source in range(4):
        for target in range(4):
            if source != target:
                mixed = np.uint32(0xCA01F9DD) * pool[target] - np.uint32(0x4973F715) * absorb(pool[source])
                pool[target] = mixed ^ mixed >> np.uint32(16)
    squeeze = _Hash(0x8B51F9DD, 0x58F38DED)
    first_half, second_half = (squeeze(word).astype(np.uint64) for word in pool[:2])
    return first_half | second_half << np.uint64(32)


_WORD = 2**32 - 1


class _Hash:
    """A multiplicative hash of words of 32 bits, with another constant in each call."""

    def __init__(self, constant: int, multiplier: int) -> None:
        self.constant, self.multiplier = constant, multiplier

    def __call__(self, words: np.ndarray) -> np.ndarray:
        words = words ^ np.uint32(self.constant)
        self.constant = self.constant * self.multiplier & _WORD
        words = words * np.uint32(self.constant)
        return words ^ words >> np.uint32(16)


class SequentialBatchSampler(Sampler[list[int]]):
    """Sampler of all samples once, in order. Rank r of R takes the samples r, r + R, r + 2R, …

    >>> list(SequentialBatchSampler(num_samples=7, batch_size=2, rank=0, world_size=2))
    [[0, 2], [4, 6]]
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        indices = range(num_samples)[rank::world_size]
        self.batches = [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def evenly_spaced(length: int, count: int) -> range:
    """Return the indices of up to `count` samples at equal distances, from the first one.

    >>> list(evenly_spaced(length=10, count=3))
    [0, 3, 6]
    """
    return range(0, length, max(1, length // count))[:count]


def load_batches(
    dataset: MapDataset, batch_sampler: Iterable[list[Any]], num_workers: int, pin_memory: bool = False
) -> Iterator[Any]:
    """Yield collated batches in the order of the sampler, prefetched by `num_workers` processes.

    Raises:
        UserError: If the data set raises one, a worker process is killed, or there is too little shared memory.
        OSError: If the data set raises one.
    """
    loader = DataLoader(
        _UserErrorsAsValues(dataset),
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_init_worker,
    )
    try:
        with _without_sigchld_handler():
            batches = iter(loader)  # starts the workers
    except OSError as error:
        raise UserError(
            f"data.num_workers: cannot start {num_workers} workers ({error}). Check that /dev/shm is writable, and the "
            "limits on processes and memory, or set data.num_workers to 0."
        ) from None
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not _has_dead_worker(batches, error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"data.num_workers: a worker process died ({reason}), most likely because memory ran out. Use fewer "
                "workers and run the same command again."
            ) from None
        if isinstance(batch, UserError | OSError):
            try:
                raise batch
            finally:
                del batch, batches  # break the reference cycle with the traceback, so that the workers exit at once
        yield batch


@contextmanager
def _without_sigchld_handler() -> Iterator[None]:
    """Remove the SIGCHLD handler that DataLoader installs.

    The handler raises an exception at whatever the main process is doing when a worker dies. Without it, the exception
    is raised when the next batch is requested.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        yield
        return
    previous = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)


def shared_memory_error(error: Exception) -> UserError:
    """Return the error for shared memory that is missing, full or read-only."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"data.num_workers: workers cannot use shared memory, /dev/shm ({reason}). Make it larger and writable, or set "
        "data.num_workers to 0."
    )


def _has_dead_worker(batches: object, error: Exception) -> bool:
    """Return whether a worker was killed, which also breaks the pipes and the shared memory that it used."""
    if str(error).startswith("DataLoader worker"):
        return True
    workers: list[Process] = getattr(batches, "_workers", [])
    for worker in workers:
        worker.join(1 / len(workers))  # a killed worker may need a moment to become a zombie
    return any(not worker.is_alive() for worker in workers)


class _UserErrorsAsValues(Dataset[Any]):
    """Wrapper that returns errors instead of raising them: DataLoader would wrap their message in a traceback."""

    def __init__(self, dataset: MapDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        try:
            read_many = getattr(self.dataset, "__getitems__", None)
            return read_many(keys) if read_many else [self.dataset[key] for key in keys]
        except (UserError, OSError) as error:
            return error


def _collate(samples: Any) -> Any:
    if isinstance(samples, Exception) or get_worker_info() is None:
        return default_collate(samples) if isinstance(samples, list) else samples
    try:
        batch = default_collate(samples) if isinstance(samples, list) else samples
        # The thread that sends the batch would do this too, but an error there would block the main process forever.
        _share_memory(batch)
    except RuntimeError as error:
        if "shared memory" not in str(error) and "</torch_" not in str(error):
            raise
        return shared_memory_error(error)
    return batch


def _share_memory(batch: Any) -> None:
    """Move the tensors of a batch to shared memory."""
    if isinstance(batch, Tensor):
        batch.share_memory_()
    elif isinstance(batch, list | tuple):
        for part in batch:
            _share_memory(part)


def _print_unless_disconnected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception in a worker, unless it only says that the main process or another worker has died."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _is_orphan() -> bool:
    """Return whether the main process has died while this worker started."""
    parent = parent_process()
    if parent is None:
        return False
    # The main process is the parent only of forked workers, and among these, each keeps the others' sentinels open.
    return os.getppid() != parent.pid if get_start_method() == "fork" else not parent.is_alive()


def _init_worker(_: int) -> None:
    if _is_orphan():
        os._exit(1)  # DataLoader only notices that the main process dies after this point
    sys.excepthook = _print_unless_disconnected  # the thread that shares memory with the main process uses it
    torch.set_num_threads(1)
    # A signal to the process group is for the main process, which saves a checkpoint and then stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

"""The order in which training sees its data: a function of the seed and the step alone, so any step can be resumed.

The items of all epochs, each shuffled anew, form one endless line; step s takes the global batch [s · B, (s + 1) · B).
A process takes its contiguous share of it, so two processes see what one with the double batch sees, in the same order.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from vqvae2.errors import UserError

SampleKey = tuple[int, int]  # (index of the item, a number to draw its augmentation from)


class MapDataset(Protocol):
    """A data set with a length whose items are found by index, or by (index, draw) for training."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


class ResumableBatchSampler(Sampler[list[SampleKey]]):
    """Keys of this process's micro-batches from step `start` up to `stop`; `gradient_accumulation_steps` of them make a step."""

    def __init__(
        self,
        count: int,
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
                f"batch_size {batch_size} does not divide by {world_size} processes × {gradient_accumulation_steps} accumulated batches"
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.start, self.stop, self.gradient_accumulation_steps = start, stop, gradient_accumulation_steps
        self.rank, self.world_size = rank, world_size
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        share = self.batch_size // self.world_size
        micro = share // self.gradient_accumulation_steps
        for step in range(self.start, self.stop):
            first = step * self.batch_size + self.rank * share
            for begin in range(first, first + share, micro):
                yield [self._key(position) for position in range(begin, begin + micro)]

    def __len__(self) -> int:
        return (self.stop - self.start) * self.gradient_accumulation_steps

    def _key(self, position: int) -> SampleKey:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        draw = np.random.SeedSequence((self.seed, position)).generate_state(1, np.uint64)[0]
        return int(self._permutation[place]), int(draw)


class SequentialBatchSampler(Sampler[list[int]]):
    """Every item once, in order, in batches; processes share them by turns and none is seen twice."""

    def __init__(self, count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        indices = range(count)[rank::world_size]
        self.batches = [list(indices[at : at + batch_size]) for at in range(0, len(indices), batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def load_batches(
    dataset: MapDataset, order: Iterable[list[Any]], num_workers: int, pin_memory: bool = False
) -> Iterator[Any]:
    """Collated batches in the given order, prefetched by worker processes.

    A worker's UserError is raised as it is; a worker that the system has killed becomes one.
    """
    loader = DataLoader(
        _Careful(dataset),
        batch_sampler=order,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_one_thread,
    )
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                f"a process that reads data has died ({str(error).splitlines()[0]}), most likely for want of memory; "
                "set data.num_workers lower and run the same command again"
            ) from None
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Careful(Dataset[Any]):
    """Hands a UserError on as a value: a DataLoader would bury its one line in a worker's traceback."""

    def __init__(self, dataset: MapDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        try:
            read_many = getattr(self.dataset, "__getitems__", None)
            return read_many(keys) if read_many else [self.dataset[key] for key in keys]
        except UserError as error:
            return error


def _collate(items: Any) -> Any:
    return default_collate(items) if isinstance(items, list) else items


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)

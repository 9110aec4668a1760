"""Test the order of training data: reproducible, resumable, and partitioned over processes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqvae2.data.samplers import ResumableBatchSampler, SequentialBatchSampler, load_batches, spawn_seeds
from vqvae2.errors import UserError


def keys(count: int = 20, batch: int = 8, start: int = 0, stop: int = 5, **others: int) -> list[list[tuple[int, int]]]:
    return list(ResumableBatchSampler(count, batch, start=start, stop=stop, **others))


def test_start_skips_earlier_batches() -> None:
    assert keys(start=3) == keys()[3:]


def test_every_epoch_contains_each_item_once() -> None:
    indices = [index for batch in keys(count=20, batch=8, stop=5) for index, _ in batch]
    assert sorted(indices[:20]) == list(range(20))
    assert sorted(indices[20:]) == list(range(20))
    assert indices[:20] != indices[20:], "each epoch has its own order"


def test_ranks_and_micro_batches_partition_each_batch() -> None:
    whole = keys(batch=8)
    ranks = [keys(batch=8, rank=rank, world_size=2) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole
    micro = keys(batch=8, gradient_accumulation_steps=4)
    assert [[key for part in micro[at : at + 4] for key in part] for at in range(0, len(micro), 4)] == whole


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**41) | st.sampled_from([0, 2**32 - 2, 2**32]), st.integers(0, 4))
def test_augmentation_seeds_are_those_of_numpy(seed: int, first: int, count: int) -> None:
    expected = [np.random.SeedSequence((seed, first + n)).generate_state(1, np.uint64)[0] for n in range(count)]
    assert spawn_seeds(seed, first, first + count).tolist() == expected


def test_order_depends_on_the_seed() -> None:
    assert keys(seed=1) != keys(seed=2)


def test_indivisible_batch_size_raises() -> None:
    with pytest.raises(UserError, match="batch_size: 8 is not divisible by 3 processes × 1"):
        keys(world_size=3)


@given(count=st.integers(0, 50), batch=st.integers(1, 9), world_size=st.integers(1, 4))
def test_sequential_sampler_covers_each_item_once(count: int, batch: int, world_size: int) -> None:
    seen = [
        i for rank in range(world_size) for part in SequentialBatchSampler(count, batch, rank, world_size) for i in part
    ]
    assert sorted(seen) == list(range(count))


class Numbers:
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 7:
            raise UserError("item 7 is corrupted")
        return torch.tensor(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_worker_error_keeps_its_message(num_workers: int) -> None:
    batches = load_batches(Numbers(), SequentialBatchSampler(10, 3), num_workers)
    assert next(batches).tolist() == [0, 1, 2]
    with pytest.raises(UserError) as error:
        list(batches)
    assert str(error.value) == "item 7 is corrupted"

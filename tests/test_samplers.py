"""The order of training data: a function of seed and step, shared by processes, covering every epoch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqvae2.data.samplers import ResumableBatchSampler, SequentialBatchSampler, load_batches
from vqvae2.errors import UserError


def keys(count: int = 20, batch: int = 8, start: int = 0, stop: int = 5, **others: int) -> list[list[tuple[int, int]]]:
    return list(ResumableBatchSampler(count, batch, start=start, stop=stop, **others))


def test_starting_later_gives_the_rest() -> None:
    assert keys(start=3) == keys()[3:]


def test_every_epoch_has_each_item_once() -> None:
    indices = [index for batch in keys(count=20, batch=8, stop=5) for index, _ in batch]
    assert sorted(indices[:20]) == list(range(20))
    assert sorted(indices[20:]) == list(range(20))
    assert indices[:20] != indices[20:], "shuffled anew"


def test_two_processes_and_accumulated_batches_see_the_batches_of_one() -> None:
    whole = keys(batch=8)
    ranks = [keys(batch=8, rank=rank, world_size=2) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole
    micro = keys(batch=8, gradient_accumulation_steps=4)
    assert [[key for part in micro[at : at + 4] for key in part] for at in range(0, len(micro), 4)] == whole


def test_another_seed_gives_another_order() -> None:
    assert keys(seed=1) != keys(seed=2)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size: 8 is not divisible by 3 processes × 1"):
        keys(world_size=3)


@given(count=st.integers(0, 50), batch=st.integers(1, 9), world_size=st.integers(1, 4))
def test_in_order_sees_everything_once(count: int, batch: int, world_size: int) -> None:
    seen = [
        i for rank in range(world_size) for part in SequentialBatchSampler(count, batch, rank, world_size) for i in part
    ]
    assert sorted(seen) == list(range(count))


class Numbers:
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 7:
            raise UserError("item 7 is damaged")
        return torch.tensor(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_worker_arrives_as_the_one_line_it_was(num_workers: int) -> None:
    batches = load_batches(Numbers(), SequentialBatchSampler(10, 3), num_workers)
    assert next(batches).tolist() == [0, 1, 2]
    with pytest.raises(UserError) as error:
        list(batches)
    assert str(error.value) == "item 7 is damaged"

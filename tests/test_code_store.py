"""Test the code store: round trip, size, resuming, and errors for unfinished and mismatched stores."""

import multiprocessing
import pickle
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqvae2.code_maps import MapSpec
from vqvae2.data.code_store import RECORDS_PER_VALUE, CodeHeader, CodeStore, CodeWriter, to_int64
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.errors import UserError


def header(count: int, *levels: tuple[int, int, int], classes: tuple[str, ...] = tuple("abcde")) -> CodeHeader:
    maps = tuple(MapSpec(codebook_size=codes, height=height, width=width) for codes, height, width in levels)
    return CodeHeader(levels=maps, count=count, classes=classes, split="train", source="here", autoencoder="a" * 64)


def contents(header: CodeHeader, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = [
        torch.randint(level.codebook_size, (header.count, *level.shape), generator=generator) for level in header.levels
    ]
    return maps, torch.randint(-1, 5, (header.count,), generator=generator)


def write(path: Path, header: CodeHeader, only: list[int] | None = None) -> tuple[list[torch.Tensor], torch.Tensor]:
    maps, labels = contents(header)
    writer = CodeWriter(path, header)
    for number in writer.missing_values() if only is None else only:
        part = slice(number * RECORDS_PER_VALUE, (number + 1) * RECORDS_PER_VALUE)
        writer.write(number, [level[part] for level in maps], labels[part])
    if only is None:
        writer.finish()
    else:
        writer.close()
    return maps, labels


@given(
    count=st.integers(1, 150),
    levels=st.lists(
        st.tuples(st.sampled_from([1, 255, 256, 257, 70_000]), st.integers(1, 5), st.integers(1, 5)),
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=15, deadline=None)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, count: int, levels: list[tuple[int, int, int]]) -> None:
    path = tmp_path_factory.mktemp("store")
    spec = header(count, *levels)
    maps, labels = write(path, spec)
    store = CodeStore.open(path)
    order = np.random.default_rng(0).permutation(count).tolist()
    codes, found = store.read(order)
    assert len(store) == count
    assert torch.equal(found, labels[order])
    for level, expected in zip(codes, maps, strict=True):
        assert level.dtype == torch.int64
        assert torch.equal(level, expected[order])


def test_records_use_the_narrowest_little_endian_integers() -> None:
    record = header(1, (256, 2, 2), (512, 1, 1), (70_000, 1, 1)).record_dtype
    assert [record[f"level{index}"].base.str for index in range(3)] == ["|u1", "<u2", "<u4"]


def test_store_is_at_most_27_percent_of_pickled_int64_records(tmp_path: Path) -> None:
    spec = header(256, (512, 64, 64), (512, 32, 32))
    maps, _ = write(tmp_path / "ours", spec)
    environment = lmdb.open(str(tmp_path / "theirs"), map_size=2**28)
    with environment.begin(write=True) as transaction:
        for index in range(256):
            row = (maps[1][index].numpy(), maps[0][index].numpy(), f"image{index}.png")
            transaction.put(str(index).encode(), pickle.dumps(row))
    used = environment.info()["last_pgno"] + 1
    environment.close()
    ours = lmdb.open(str(tmp_path / "ours"), readonly=True, lock=False)
    pages = ours.info()["last_pgno"] + 1
    ours.close()
    assert pages / used < 0.27


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_read_the_same_batches(tmp_path: Path, num_workers: int) -> None:
    maps, labels = write(tmp_path, header(100, (300, 3, 2), (20, 1, 1)))
    store = CodeStore.open(tmp_path)
    store.read([0])  # open in the parent before the workers fork
    batches = list(load_batches(store, SequentialBatchSampler(100, 16), num_workers))
    assert torch.equal(torch.cat([batch.codes[0] for batch in batches]), maps[0])
    assert torch.equal(torch.cat([batch.label for batch in batches]), labels)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_open_store_is_readable_in_forked_and_spawned_processes(tmp_path: Path, method: str) -> None:
    maps, _ = write(tmp_path, header(200, (300, 4, 4), (12, 2, 2)))
    store = CodeStore.open(tmp_path)
    assert torch.equal(store.read([199, 3]).codes[0], maps[0][[199, 3]])  # opens the memory map in this process
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(sum_of_codes, [store]) == [int(maps[0].sum())]
    assert sum_of_codes(store) == int(maps[0].sum())


def sum_of_codes(store: CodeStore) -> int:
    return int(store.read(range(len(store))).codes[0].sum())


def test_batches_keep_the_stored_integer_width(tmp_path: Path) -> None:
    maps, labels = write(tmp_path, header(70, (256, 4, 4), (300, 2, 2), (40_000, 1, 1), (70_000, 1, 1)))
    batch = CodeStore.open(tmp_path).__getitems__([(5, 0), (69, 1)])
    assert [level.dtype for level in batch.codes] == [torch.uint8, torch.int16, torch.int32, torch.int32]
    codes, found = to_int64(batch)
    assert found.dtype == torch.int64
    assert torch.equal(found, labels[[5, 69]])
    for level, expected in zip(codes, maps, strict=True):
        assert level.dtype == torch.int64
        assert torch.equal(level, expected[[5, 69]])


def test_interrupted_writer_resumes(tmp_path: Path) -> None:
    spec = header(200, (300, 3, 2))
    write(tmp_path, spec, only=[0, 2])
    with pytest.raises(UserError, match=r"unfinished code store\. Run `vqvae2 extract-codes` again"):
        CodeStore.open(tmp_path)
    writer = CodeWriter(tmp_path, spec)
    assert writer.missing_values() == [1, 3]
    writer.close()
    maps, _ = write(tmp_path, spec)
    assert torch.equal(CodeStore.open(tmp_path).read(range(200)).codes[0], maps[0])


def test_lmdb_map_grows_on_demand(tmp_path: Path) -> None:
    spec = header(20 * RECORDS_PER_VALUE, (512, 128, 256))
    write(tmp_path, spec)
    assert (tmp_path / "data.mdb").stat().st_size > 64 * 2**20
    assert CodeStore.open(tmp_path).header.complete


def test_writer_with_another_header_raises_and_keeps_records(tmp_path: Path) -> None:
    spec = header(70, (300, 3, 2))
    write(tmp_path, spec, only=[0])
    with pytest.raises(UserError, match="codes of other images or another autoencoder"):
        CodeWriter(tmp_path, spec.model_copy(update={"autoencoder": "b" * 64}))
    writer = CodeWriter(tmp_path, spec)
    assert writer.missing_values() == [1]
    writer.close()


def test_missing_and_corrupted_store_errors_name_the_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no code store\. Create it with `vqvae2 extract-codes`"):
        CodeStore.open(tmp_path / "missing")
    (tmp_path / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(UserError, match="corrupted code store"):
        CodeStore.open(tmp_path)
    foreign = tmp_path / "foreign"
    lmdb.open(str(foreign)).close()
    with pytest.raises(UserError, match="not a code store"):
        CodeStore.open(foreign)


def test_store_of_another_autoencoder_raises_with_both_digests() -> None:
    with pytest.raises(UserError, match=r"aaaaaaaaaaaa….*bbbbbbbbbbbb…"):
        header(1, (2, 1, 1)).check_autoencoder("b" * 64, Path("codes/train"))


def test_a_store_opens_by_relative_absolute_and_linked_paths(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(finished_run / "codes")
    monkeypatch.chdir(finished_run)
    stores = [CodeStore.open(path) for path in ("codes/val", finished_run / "codes" / "val", tmp_path / "link" / "val")]
    expected = stores[0].read([0, 3])
    for store in stores[1:]:
        assert all(torch.equal(*maps) for maps in zip(store.read([0, 3]).codes, expected.codes, strict=True))

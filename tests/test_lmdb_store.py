"""Databases that are sealed: damage is found, a copy is not damage, and a full or read-only disk is one line."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_code_store import header, write
from vqvae2.data import lmdb_store
from vqvae2.data.code_store import CodeStore, CodeWriter
from vqvae2.errors import UserError

WANTED = header(100, (300, 4, 4), (12, 2, 2))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write(tmp_path / "store", WANTED)
    return tmp_path / "store"


@pytest.mark.parametrize("place", [0, 5_000, -1], ids=["first page", "in between", "last page"])
def test_a_changed_byte_is_found(store: Path, place: int) -> None:
    content = bytearray((store / "data.mdb").read_bytes())
    content[place] ^= 1
    (store / "data.mdb").write_bytes(bytes(content))
    lmdb_store.close_reader(store)
    for use in (lambda: CodeStore.open(store), lambda: CodeWriter(store, WANTED)):
        with pytest.raises(UserError, match=r"store: .*checksum mismatch"):
            use()


def test_a_file_cut_short_is_found_with_and_without_a_seal(store: Path) -> None:
    with (store / "data.mdb").open("r+b") as file:
        file.truncate(3 * 4096)
    for message in ("checksum mismatch", "truncated file"):
        lmdb_store.close_reader(store)
        with pytest.raises(UserError, match=rf"corrupted code store \({message}"):
            CodeStore.open(store)
        (store / "seal.json").unlink(missing_ok=True)


def test_a_copy_is_checked_once_and_then_known(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    os.utime(copy / "data.mdb", (1, 1))
    assert len(CodeStore.open(copy)) == 100
    lmdb_store.close_reader(copy)
    monkeypatch.setattr(lmdb_store.files, "digest", lambda _: pytest.fail("the digest is known"))
    assert len(CodeStore.open(copy)) == 100


def test_a_store_killed_before_it_was_sealed_is_unfinished_and_gone_on_with(store: Path) -> None:
    (store / "seal.json").unlink()
    with pytest.raises(UserError, match="unfinished code store"):
        CodeStore.open(store)
    writer = CodeWriter(store, WANTED)
    assert writer.missing_values() == []
    writer.finish()
    assert len(CodeStore.open(store)) == 100


def test_writing_breaks_the_seal_and_refusing_to_write_does_not(store: Path) -> None:
    with pytest.raises(UserError, match="codes of other images or another autoencoder"):
        CodeWriter(store, WANTED.model_copy(update={"autoencoder": "b" * 64}))
    assert lmdb_store.is_sealed(store)
    environment = lmdb_store.open_writer(store)
    lmdb_store.put(environment, [(b"key", b"value")])
    environment.close()
    assert not lmdb_store.is_sealed(store)


def test_a_full_disk_keeps_what_was_written_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    path = small_disk / "store"
    wanted = header(64 * 40, (70_000, 16, 8))
    with pytest.raises(UserError, match=r"store: cannot write .*Free disk space.*completed work is kept"):
        write(path, wanted)
    writer = CodeWriter(path, wanted)
    missing = writer.missing_values()
    writer.close()
    assert 0 < len(missing) < 40
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    maps, labels = write(path, wanted, only=missing)
    CodeWriter(path, wanted).finish()
    found = CodeStore.open(path).read(range(len(labels)))
    assert (found.label == labels).all()
    assert (found.codes[0] == maps[0]).all()
    lmdb_store.close_reader(path)


def test_a_read_only_disk_is_one_line_and_a_store_on_it_is_read(small_disk: Path) -> None:
    path = small_disk / "store"
    write(path, WANTED)
    os.utime(path / "data.mdb", (1, 1))  # so that the seal would be renewed
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert len(CodeStore.open(path)) == 100
    with pytest.raises(UserError, match=r"store: cannot write .*Read-only"):
        CodeWriter(path, WANTED)
    lmdb_store.close_reader(path)

"""Test sealed LMDB stores: corruption, copies, interrupted writes, and full or read-only disks."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest

from tests.test_code_store import header, write
from vqvae2.data import lmdb_environment
from vqvae2.data.code_store import CodeStore, CodeWriter
from vqvae2.errors import UserError

HEADER = header(100, (300, 4, 4), (12, 2, 2))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write(tmp_path / "store", HEADER)
    return tmp_path / "store"


@pytest.mark.parametrize("position", [0, 5_000, -1], ids=["first page", "middle page", "last page"])
def test_changed_byte_is_detected(store: Path, position: int) -> None:
    content = bytearray((store / "data.mdb").read_bytes())
    content[position] ^= 1
    (store / "data.mdb").write_bytes(bytes(content))
    lmdb_environment.close_reader(store)
    for use in (lambda: CodeStore.open(store), lambda: CodeWriter(store, HEADER)):
        with pytest.raises(UserError, match=r"store: .*checksum mismatch"):
            use()


def test_truncated_file_is_detected_with_and_without_a_seal(store: Path) -> None:
    with (store / "data.mdb").open("r+b") as file:
        file.truncate(3 * 4096)
    for message in ("checksum mismatch", "truncated file"):
        lmdb_environment.close_reader(store)
        with pytest.raises(UserError, match=rf"corrupted code store \({message}"):
            CodeStore.open(store)
        (store / "seal.json").unlink(missing_ok=True)


def test_file_that_was_truncated_opens_once_it_is_restored(store: Path) -> None:
    content = (store / "data.mdb").read_bytes()
    (store / "seal.json").unlink()
    lmdb_environment.close_reader(store)
    os.truncate(store / "data.mdb", 3 * 4096)
    with pytest.raises(UserError, match="truncated file") as caught:
        lmdb_environment.open_reader(store)
    (store / "data.mdb").write_bytes(content)
    lmdb_environment.open_reader(store)  # although the traceback of the error still exists
    assert caught.tb


def test_readers_of_the_parent_process_do_not_prevent_opening(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMDB identifies files by inode, and a new file may have the inode of a deleted one, here by a hard link."""
    write(tmp_path / "other", HEADER)
    (tmp_path / "other" / "lock.mdb").unlink()
    os.link(store / "data.mdb", tmp_path / "other" / "lock.mdb")
    lmdb_environment.close_reader(store)
    lmdb_environment.open_reader(tmp_path / "other")
    with pytest.raises(UserError, match="already open in this process"):
        lmdb_environment.open_reader(store)
    forked = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: forked)
    lmdb_environment.open_reader(store)


def test_store_that_another_process_made_again_is_opened_again(store: Path, tmp_path: Path) -> None:
    other = HEADER.model_copy(update={"autoencoder": "b" * 64})
    assert CodeStore.open(store).header.autoencoder == HEADER.autoencoder
    write(tmp_path / "other", other)
    lmdb_environment.close_reader(tmp_path / "other")
    shutil.rmtree(store)
    (tmp_path / "other").rename(store)
    assert CodeStore.open(store).header.autoencoder == "b" * 64
    os.link(store / "data.mdb", tmp_path / "kept")  # a new file with the inode of the removed one
    shutil.rmtree(store)
    (tmp_path / "new").mkdir()
    (tmp_path / "kept").rename(tmp_path / "new" / "data.mdb")
    lmdb_environment.open_reader(tmp_path / "new")


def test_copy_is_verified_only_once(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    os.utime(copy / "data.mdb", (1, 1))
    assert len(CodeStore.open(copy)) == 100
    lmdb_environment.close_reader(copy)
    monkeypatch.setattr(lmdb_environment.files, "digest", lambda _: pytest.fail("the copy was verified again"))
    assert len(CodeStore.open(copy)) == 100


def test_unsealed_store_is_unfinished_and_resumes(store: Path) -> None:
    (store / "seal.json").unlink()
    with pytest.raises(UserError, match="unfinished code store"):
        CodeStore.open(store)
    writer = CodeWriter(store, HEADER)
    assert writer.missing_values() == []
    writer.finish()
    assert len(CodeStore.open(store)) == 100


def test_writing_removes_the_seal_and_a_rejected_writer_keeps_it(store: Path) -> None:
    with pytest.raises(UserError, match="codes of other images or another autoencoder"):
        CodeWriter(store, HEADER.model_copy(update={"autoencoder": "b" * 64}))
    assert lmdb_environment.is_sealed(store)
    environment = lmdb_environment.open_writer(store)
    lmdb_environment.put(environment, [(b"key", b"value")])
    environment.close()
    assert not lmdb_environment.is_sealed(store)


def test_full_disk_keeps_written_records_and_writing_resumes(small_disk: Path) -> None:
    path = small_disk / "store"
    spec = header(64 * 40, (70_000, 16, 8))
    with pytest.raises(UserError, match=r"store: cannot write .*Free disk space.*completed work is kept"):
        write(path, spec)
    writer = CodeWriter(path, spec)
    missing = writer.missing_values()
    writer.close()
    assert 0 < len(missing) < 40
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    maps, labels = write(path, spec, only=missing)
    CodeWriter(path, spec).finish()
    found = CodeStore.open(path).read(range(len(labels)))
    assert (found.label == labels).all()
    assert (found.codes[0] == maps[0]).all()
    lmdb_environment.close_reader(path)


def test_lock_file_is_allocated_because_a_full_disk_would_kill_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lmdb_environment.open_writer(tmp_path / "a").close()
    status = (tmp_path / "a" / "lock.mdb").stat()
    assert status.st_blocks * 512 >= status.st_size > 512 * 64

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"/b: cannot write \(.*No space left on device\)\. Free disk space"):
        lmdb_environment.open_writer(tmp_path / "b")


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_file_that_was_cut_while_it_was_created_is_created_again(tmp_path: Path, size: int) -> None:
    """A full disk can end the first write of LMDB, two pages, at any byte."""
    path = tmp_path / "store"
    lmdb_environment.open_writer(path).close()
    (path / "data.mdb").write_bytes((path / "data.mdb").read_bytes()[:size])
    assert not lmdb_environment.exists(path)
    write(path, HEADER)
    CodeWriter(path, HEADER).finish()
    assert len(CodeStore.open(path)) == HEADER.count


def test_read_only_store_is_readable_and_writing_gives_one_line_error(small_disk: Path) -> None:
    path = small_disk / "store"
    write(path, HEADER)
    os.utime(path / "data.mdb", (1, 1))  # a new modification time would rewrite the seal
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert len(CodeStore.open(path)) == 100
    with pytest.raises(UserError, match=r"store: cannot write .*Read-only"):
        CodeWriter(path, HEADER)
    lmdb_environment.close_reader(path)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any], records: dict[bytes, bytes] | None = None) -> None:
    """Change the header and the records of a store, and seal it again."""
    lmdb_environment.close_reader(path)
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        value = json.loads(transaction.get(b"header"))
        changed = change(value)
        transaction.put(b"header", json.dumps(value if changed is None else changed).encode())
        for key, record in (records or {}).items():
            transaction.put(key, record)
    lmdb_environment.seal(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": -1}, "count"),
        ({"count": 10**12}, "is missing or truncated"),
        ({"count": "many"}, "count"),
        ({"levels": []}, "levels"),
        ({"levels": [{"codebook_size": 300, "height": 2**20, "width": 2**20}]}, "more than 268,435,456 codes"),
        ({"levels": [{"codebook_size": -1, "height": 4, "width": 4}]}, "codebook_size"),
        ({"levels": [{"codebook_size": 300, "height": 5, "width": 4}]}, "is missing or truncated"),
        ({"unreadable": [100]}, "unreadable"),
        ({"unreadable": [3, 3]}, "unreadable"),
        ({"unreadable": [3]}, "lists a readable record"),
        ({"format": {}}, "format"),
        ({"classes": 5}, "classes"),
    ],
)
def test_invalid_header_is_refused(store: Path, changes: dict[str, Any], words: str) -> None:
    rewrite(store, lambda header: header.update(changes))
    with pytest.raises(UserError, match=rf"store: .*{words}.*Delete the folder"):
        CodeStore.open(store)


def test_header_that_is_not_an_object_is_refused(store: Path) -> None:
    rewrite(store, lambda header: [header])
    with pytest.raises(UserError, match="store: not a code store"):
        CodeStore.open(store)


@pytest.mark.parametrize("index", [0, 1])
def test_short_and_out_of_range_records_are_refused(store: Path, index: int) -> None:
    key = lmdb_environment.encode_key(index)
    size = (64, 36)[index] * HEADER.record_dtype.itemsize
    rewrite(store, lambda header: None, {key: bytes(size - 1)})
    with pytest.raises(UserError, match=rf"value {index} is missing or truncated"):
        CodeStore.open(store)
    for filled in (b"\xff", b"\x05"):  # label −1 and codes of 65,535; label and codes of 0x0505…
        rewrite(store, lambda header: None, {key: filled * size})
        with pytest.raises(UserError, match="a code or a label is out of range"):
            CodeStore.open(store).read([64 * index])


def test_writer_writes_short_values_again(store: Path) -> None:
    rewrite(store, lambda header: None, {lmdb_environment.encode_key(0): b"short"})
    writer = CodeWriter(store, HEADER)
    assert writer.missing_values() == [0]
    writer.close()


def test_class_names_that_are_not_utf8_are_stored(tmp_path: Path) -> None:
    names = tuple(f"caf\udce9{number}" for number in range(5))
    write(tmp_path / "names", header(3, (300, 4, 4), classes=names))
    assert CodeStore.open(tmp_path / "names").header.classes == names


@pytest.mark.parametrize("text", ["null", "[]", '{"sha256": 1}', "5" * 5000])
def test_invalid_seal_is_refused(store: Path, text: str) -> None:
    lmdb_environment.close_reader(store)
    (store / "seal.json").write_text(text)
    with pytest.raises(UserError, match=r"seal\.json: .*Delete the folder"):
        CodeStore.open(store)

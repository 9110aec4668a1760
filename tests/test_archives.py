"""Test folders and archives with unusual contents: names, classes, false sizes, and files of other kinds."""

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqvae2.data.image_io import UnreadableImageError
from vqvae2.data.images import DataConfig, ImageDataset
from vqvae2.data.sources import FolderSource, TarSource, ZipSource, open_source, tar
from vqvae2.data.sources.archive import RangeReader
from vqvae2.data.sources.base import Source
from vqvae2.data.splits import open_datasets
from vqvae2.errors import UserError

Members = dict[str, bytes]


def png(seed: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def numbered(*folders: str) -> Members:
    return {f"{folders[number % len(folders)]}/{number}.png": png(number) for number in range(12)}


def write_folder(members: Members, out: Path) -> Path:
    for name, data in members.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    return out


def write_zip(members: Members, out: Path) -> Path:
    with zipfile.ZipFile(out.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.with_suffix(".zip")


def write_tar(members: Members, out: Path) -> Path:
    with tarfile.open(out.with_suffix(".tar"), "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.with_suffix(".tar")


WRITERS = {"folder": write_folder, "zip": write_zip, "tar": write_tar}
Writer = Callable[[Members, Path], Path]
every_kind = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def source(path: Path) -> Source:
    return open_source(str(path))


def classes_of(source: Source) -> dict[str, str]:
    index = source.index
    return {name: index.classes[label] for name, label in zip(index.names, index.labels, strict=True)}


@pytest.mark.parametrize("folders", [("cat", "dog"), ("photos/cat", "photos/dog"), ("a/b/c2/x", "a/b/c10/y")])
def test_classes_and_labels_agree_for_folder_zip_and_tar(folders: Sequence[str], tmp_path: Path) -> None:
    members = numbered(*folders)
    sources = [source(write(members, tmp_path / "images")) for write in WRITERS.values()]
    assert [type(each) for each in sources] == [FolderSource, ZipSource, TarSource]
    for each in sources:
        assert list(each.index.names) == sorted(members)
        assert each.index.classes == sources[0].index.classes
        assert each.index.labels.tolist() == sources[0].index.labels.tolist()
        assert each.index.digest(np.arange(12)) == sources[0].index.digest(np.arange(12))
    parts = {folder.removeprefix("photos/").removeprefix("a/b/").split("/")[0] for folder in folders}
    assert sources[0].index.classes == tuple(sorted(parts))


@every_kind
def test_a_folder_of_splits_is_not_taken_for_classes(
    write: Writer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(numbered("ILSVRC/train/n01", "ILSVRC/train/n02", "ILSVRC/val/n01"), tmp_path / "imagenet")
    with pytest.raises(UserError, match=r"contains the splits train, val instead of classes.*ILSVRC/train") as error:
        open_datasets(DataConfig(path=str(path), size=8, labels="folder"))
    if write is write_folder:
        assert f"data.path: {path}/ILSVRC/train." in str(error.value)
        one, other = open_datasets(DataConfig(path=f"{path}/ILSVRC/train", size=8, labels="folder"))
        assert one.classes == other.classes == ("n01", "n02")
    assert caplog.text == ""
    open_datasets(DataConfig(path=str(path), size=8))
    assert "all images of all splits are used" in caplog.text


@every_kind
def test_other_and_hidden_files_are_left_out_and_reported(
    write: Writer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = dict.fromkeys(("cat/a.psd", "cat/b.psd", "c.svg", "d.mp4", "e.txt", "cat/._0.png"), b"x")
    path = write(numbered("cat") | other | {".git/x.png": b"x", "cat/.cache/y.psd": b"x"}, tmp_path / "images")
    assert len(source(path).index) == 12
    (message,) = caplog.messages
    assert f"{path}: 6 other files skipped: .psd (2), " in message
    assert all(f"{kind} (1)" in message for kind in ("hidden", ".svg", ".mp4", ".txt"))


def test_zip_names_of_other_programs(tmp_path: Path) -> None:
    members = {f"café\\{number}.png": png(number) for number in range(2)} | {
        "/cat/2.png": png(),
        "./cat//../3.png": png(),
    }
    path = write_zip(members | {"cat\\": b""}, tmp_path / "windows")
    data = path.read_bytes()
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # clear the flags that say UTF-8
        start = -1
        while (start := data.find(signature, start + 1)) >= 0:
            data = data[: start + at] + b"\0\0" + data[start + at + 2 :]
    path.write_bytes(data)
    found = source(path)
    assert classes_of(found) == {"café/0.png": "café", "café/1.png": "café", "cat/2.png": "cat", "cat/3.png": "cat"}
    assert found.open(0, (8, 8)) == png(0)


def test_zip_member_with_false_size_is_unreadable_and_not_decompressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zip({"0.png": png(), "bomb.png": bytes(10**6)}, tmp_path / "a")
    whole, sizes = path.read_bytes(), []
    decompress = zlib.decompressobj

    class Recording:
        def decompress(self, data: bytes, limit: int) -> bytes:
            assert limit > 0, "0 means no limit"
            sizes.append(len(found := decompress(-15).decompress(data, limit)))
            return found

    monkeypatch.setattr(zlib, "decompressobj", lambda _: Recording())
    for size, reason in ((0, "checksum mismatch"), (500, "checksum mismatch"), (2**31, "possible decompression bomb")):
        changed = bytearray(whole)
        struct.pack_into("<I", changed, whole.rfind(b"PK\x01\x02") + 24, size)
        path.write_bytes(changed)
        sizes.clear()
        with pytest.raises(UnreadableImageError, match=rf"bomb\.png: .*{reason}"):
            source(path).open(1, (8, 8))
        assert sizes == ([size + 1] if size < 2**31 else [])


@pytest.mark.parametrize("field", [20, 24, 42])  # compressed size, size, offset
def test_zip_fields_of_any_value_give_the_image_or_an_error(field: int, tmp_path: Path) -> None:
    whole = write_zip({"0.png": png(), "1.png": png(1)}, tmp_path / "a").read_bytes()
    for value in (0, 1, 2**31, 2**32 - 2):
        changed = bytearray(whole)
        struct.pack_into("<I", changed, whole.rfind(b"PK\x01\x02") + field, value)
        (tmp_path / "a.zip").write_bytes(changed)
        try:
            assert source(tmp_path / "a.zip").open(1, (8, 8)) == png(1)
        except UserError as error:
            assert "a.zip" in str(error)  # noqa: PT017


@pytest.mark.parametrize("size", [-512, -1024, 2**40, 2**62])
def test_tar_with_false_size_ends_with_an_error(size: int, tmp_path: Path) -> None:
    data = bytearray(write_tar({"0.png": png(), "1.png": png(1)}, tmp_path / "a").read_bytes())
    start = data.find(b"1.png")
    header = bytearray(data[start : start + 512])
    header[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % 2**88).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    data[start : start + 512] = header
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tar.*([Ii]nvalid|truncated|unexpected end)"):
        source(tmp_path / "a.tar").open(1, (8, 8))


@pytest.mark.parametrize("label", ["", " ", "7" * 5000, "-3", "a\nb", "x" * 2**16])
def test_label_files_hold_a_number_or_a_name(label: str, tmp_path: Path) -> None:
    path = write_tar({"0.png": png(), "0.cls": label.encode()}, tmp_path / "a")
    with pytest.raises(UserError, match=r"a\.tar/0\.cls: .* is not a class") as error:
        source(path)
    assert len(str(error.value)) < 200 + len(str(path))


def test_label_files_do_not_mix_numbers_and_names(tmp_path: Path) -> None:
    labels = {"0.cls": b"1", "1.cls": b"cat"}
    with pytest.raises(UserError, match=r"a\.tar/1\.cls is 'cat', but other \.cls files hold numbers"):
        source(write_tar({"0.png": png(), "1.png": png(), **labels}, tmp_path / "a"))
    labels = {"0.cls": b"dog\n", "1.cls": b"caf\xe9"}
    assert source(write_tar({"0.png": png(), "1.png": png(), **labels}, tmp_path / "a")).index.classes == (
        "caf\\xe9",
        "dog",
    )


def test_shard_ranges_are_bounded() -> None:
    assert tar.expand("x-{08..10}-{0..1}.tar")[:3] == ["x-08-0.tar", "x-08-1.tar", "x-09-0.tar"]
    for path in ("x-{0..1000000000000}.tar", "x-{000..999}-{000..999}.tar"):
        with pytest.raises(UserError, match=r"1,000,000.* shards, more than 100,000"):
            open_source(path)
    for path in (f"x-{{0..{'9' * 5000}}}.tar", "x-{0..²}.tar"):
        with pytest.raises((UserError, OSError), match=r"no such|too long"):
            open_source(path)


def test_many_shards_need_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        write_tar({f"{number}.png": png(number)}, tmp_path / f"{number}")
    expected = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(tar, "_MAX_OPEN", 3)
    shards = source(tmp_path / "{0..3}.tar")
    assert [shards.open(number, (8, 8)) for number in range(4)] == [png(number) for number in range(4)]
    assert len(list(Path("/proc/self/fd").iterdir())) == expected


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_pipes_and_folders_in_place_of_archives_raise(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: not a regular file"):
        source(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name}: is a folder"):
        source(tmp_path / name)


def test_archive_that_disappears_is_named(tmp_path: Path) -> None:
    path = write_tar(numbered("cat"), tmp_path / "a")
    images, _ = open_datasets(DataConfig(path=str(path), size=8))
    path.unlink()
    with pytest.raises(UserError, match=r"no such archive: .*a\.tar"):
        images[0]
    path.mkdir()
    with pytest.raises(UserError, match=r"cannot read .*a\.tar \(.*Is a directory"):
        RangeReader(str(path))(0, 1)


NOT_UTF8 = {b"caf\xe9/%d.png" % number: png(number) for number in range(3)} | {
    b"cat/\xe9\x1b[2J\n.png": b"not an image"
}


@pytest.fixture
def odd_names(tmp_path: Path) -> Path:
    """Write a folder of images with names that are not UTF-8 or have control characters."""
    for name, data in NOT_UTF8.items():
        path = tmp_path / "images" / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "images"


def test_odd_names_are_readable_and_shown_with_escapes(odd_names: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = source(odd_names)
    with tarfile.open(odd_names.with_suffix(".tar"), "w") as archive:
        archive.add(odd_names, ".")
    packed = source(odd_names.with_suffix(".tar"))
    assert [os.fsencode(name) for name in found.index.names] == sorted(NOT_UTF8)
    assert found.index.classes == packed.index.classes == ("caf\\xe9", "cat")
    assert list(packed.index.names) == list(found.index.names)
    config = DataConfig(path=str(odd_names), size=8, max_unreadable_fraction=0.5)
    images = ImageDataset(config, found, np.arange(4))
    assert images.read(0) is not None
    assert images.read(3) is None
    strict = config.model_copy(update={"max_unreadable_fraction": 0.0})
    with pytest.raises(UserError) as error:
        ImageDataset(strict, found, np.arange(4)).read(3)
    for text in (caplog.text.rstrip("\n"), str(error.value)):
        assert r"cat/\xe9\x1b[2J\n.png" in text
        assert text.isprintable()


def test_path_that_cannot_be_written_to_a_config_is_refused() -> None:
    for path in ("caf\udce9", "a\x1b[2J", "a\nb"):
        with pytest.raises(ValueError, match="path"):
            DataConfig(path=path)
        with pytest.raises(UserError, match=r"data.path: .*control characters or is not UTF-8") as error:
            DataConfig.from_dict({"path": path}, "test", "data")
        assert str(error.value).isprintable()


def test_unreadable_subfolder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, scan = write_folder(numbered("cat", "dog"), tmp_path / "images"), os.scandir

    def refuse(folder: str) -> object:
        if folder.endswith("dog"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"images/dog: Permission denied\. Check its permissions"):
        source(path)


def test_skipped_files_without_suffix_are_shown_with_escapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source(write_folder(numbered("cat") | {"cat/\x1b]0;x\x07": b"", "b\n": b""}, tmp_path / "images"))
    (message,) = caplog.messages
    assert message.isprintable()
    assert r"\x1b]0;x\x07 (1)" in message

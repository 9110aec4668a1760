"""Test image sources: folders, archives and datasets give the same images and labels, and the index is cached."""

import multiprocessing
import os
import pickle
import shutil
import sys
import tarfile
import time
import types
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from tests.test_commands import images
from vqvae2.data.images import DataConfig, ImageDataset
from vqvae2.data.index import ImageIndex, StringTable
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.data.sources import FolderSource, TarSource, open_source
from vqvae2.data.splits import open_datasets
from vqvae2.errors import UserError

COUNT = 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a folder with two classes of small JPEGs."""
    root = tmp_path / "images"
    for number in range(COUNT):
        path = root / ("cat", "dog")[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 26, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (root / "notes.txt").write_text("not an image")
    return root


def write_zip(folder: Path, out: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(out, "w", method) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return out


def write_tar(folder: Path, out: Path, mode: str = "w") -> Path:
    with tarfile.open(out, mode) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        archive.add(folder, ".")
    return out


def open_splits(path: object, **settings: object) -> tuple[ImageDataset, ImageDataset]:
    config = {"path": str(path), "size": 16, "labels": "folder", "val_fraction": 0.3, **settings}
    return open_datasets(DataConfig.from_dict(config, "test"))


def load_all(images: ImageDataset, num_workers: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(load_batches(images, SequentialBatchSampler(len(images), 5), num_workers))
    return torch.cat([batch.image for batch in batches]), torch.cat([batch.label for batch in batches])


def backdate(folder: Path, seconds: int = 100) -> None:
    """Move the modification times of all folders into the past."""
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        before = path.stat().st_mtime_ns - seconds * 10**9
        os.utime(path, ns=(before, before))


@pytest.mark.parametrize("kind", ["stored zip", "deflated zip", "tar"])
def test_archive_matches_its_folder(folder: Path, tmp_path: Path, kind: str) -> None:
    if kind == "tar":
        archive = write_tar(folder, tmp_path / "images.tar")
    else:
        method = zipfile.ZIP_STORED if kind == "stored zip" else zipfile.ZIP_DEFLATED
        archive = write_zip(folder, tmp_path / "images.zip", method)
    for ours, theirs in zip(open_splits(archive), open_splits(folder), strict=True):
        assert list(ours.names) == list(theirs.names)
        assert (ours.classes, ours.digest()) == (theirs.classes, theirs.digest())
        for one, other in zip(load_all(ours), load_all(theirs), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_archives_are_readable_in_forked_and_spawned_workers(folder: Path, tmp_path: Path, method: str) -> None:
    archives = [
        open_splits(write_zip(folder, tmp_path / "a.zip"))[0],
        open_splits(write_tar(folder, tmp_path / "a.tar"))[0],
    ]
    expected = [pixels(images) for images in archives]  # opens the files in this process
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(pixels, archives) == expected


def pixels(images: ImageDataset) -> bytes:
    return b"".join(images[index].image.numpy().tobytes() for index in range(len(images)))


def test_shards_form_one_source_with_classes_from_cls_files(folder: Path, tmp_path: Path) -> None:
    files = sorted(folder.rglob("*.jpg"))
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard:04d}.tar", "w") as archive:
            for number, path in enumerate(files[shard::3]):
                archive.add(path, f"{number:03d}.jpg")  # keys repeat in every shard
                label = tmp_path / "label"
                label.write_text("10" if path.parent.name == "cat" else "9")
                archive.add(label, f"{number:03d}.cls")
    images, validation = open_splits(tmp_path / "{0000..0002}.tar")
    assert len(images) + len(validation) == COUNT
    assert images.classes == ("9", "10")
    index = list(images.names).index("0001/002.jpg") if "0001/002.jpg" in set(images.names) else -1
    part, at = (images, index) if index >= 0 else (validation, list(validation.names).index("0001/002.jpg"))
    assert part.label(at) == (files[1 + 2 * 3].parent.name == "cat")
    with pytest.raises(UserError, match=r"no such archive: .*0003\.tar"):
        open_splits(tmp_path / "{0000..0003}.tar")


def test_remote_archives_match_local_ones(folder: Path, tmp_path: Path) -> None:
    memory = MemoryFileSystem()
    for number, archive in enumerate((write_tar(folder, tmp_path / "0.tar"), write_zip(folder, tmp_path / "1.zip"))):
        memory.pipe_file(f"/archives/{archive.name}", archive.read_bytes())
        ours, theirs = open_splits(f"memory://archives/{archive.name}")[0], open_splits(archive)[0]
        assert ours.digest() == theirs.digest()
        assert all(map(torch.equal, load_all(ours), load_all(theirs))), number
    shards, _ = open_splits("memory://archives/{0..0}.tar")
    assert shards.digest() == open_splits("memory://archives/0.tar")[0].digest()
    with pytest.raises(UserError, match=r"no such archive: memory://archives/3\.tar"):
        open_splits("memory://archives/3.tar")
    with pytest.raises(UserError, match=r"cannot read nowhere://a/0\.tar \(Protocol not known"):
        open_splits("nowhere://a/0.tar")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_remote_archives_are_readable_in_forked_and_spawned_workers(folder: Path, tmp_path: Path, method: str) -> None:
    images, _ = open_splits(f"file://{write_tar(folder, tmp_path / 'a.tar')}")
    expected = pixels(images)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(pixels, [images]) == [expected]


def test_remote_archive_index_is_cached_until_the_archive_changes(folder: Path, tmp_path: Path) -> None:
    memory, address, cache = MemoryFileSystem(), "memory://kept/a.tar", tmp_path / "index"
    memory.pipe_file("/kept/a.tar", write_tar(folder, tmp_path / "a.tar").read_bytes())
    assert len(open_source(address, cache).index) == COUNT
    with mock.patch.object(TarSource, "scan", side_effect=AssertionError("the cached index was not used")):
        assert len(open_source(address, cache).index) == COUNT
    (folder / "cat" / "00.jpg").unlink()
    memory.pipe_file("/kept/a.tar", write_tar(folder, tmp_path / "b.tar").read_bytes())
    assert len(open_source(address, cache).index) == COUNT - 1


def test_failed_requests_are_retried_and_then_give_one_line_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = MemoryFileSystem()
    memory.pipe_file("/flaky/a.tar", write_tar(folder, tmp_path / "a.tar").read_bytes())
    images, _ = open_splits("memory://flaky/a.tar")
    expected, read, calls = pixels(images), MemoryFileSystem.cat_file, []

    def flaky(self: MemoryFileSystem, *arguments: object, **options: object) -> bytes:
        calls.append(arguments)
        if len(calls) % 3:
            raise ConnectionError("reset by peer")
        return read(self, *arguments, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert pixels(images) == expected
    assert len(calls) == 3 * len(images)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", mock.Mock(side_effect=ConnectionError("reset by peer")))
    with pytest.raises(UserError, match=r"cannot read memory://flaky/a\.tar \(reset by peer\)\. Run the same command"):
        pixels(images)


def test_unusable_archive_errors_name_the_archive(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"not an archive")
    (tmp_path / "no.tar").write_bytes(b"not an archive" * 100)
    write_tar(folder, tmp_path / "packed.tar.gz", "w:gz")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("text.txt", "x")
    for name, message in (
        ("no.zip", "not a readable .zip"),
        ("no.tar", "not a readable uncompressed .tar"),
        ("packed.tar.gz", "Decompress it"),
        ("empty.zip", "no images in"),
        ("missing.tar", "no such archive"),
        ("{5..2}.tar", "range .* is empty"),
    ):
        with pytest.raises(UserError, match=message):
            open_splits(tmp_path / name)


def test_corrupted_archive_member_raises(folder: Path, tmp_path: Path) -> None:
    archive = write_zip(folder, tmp_path / "images.zip", zipfile.ZIP_STORED)
    images, _ = open_splits(archive)
    number = int(images.indices[0])
    data = bytearray(archive.read_bytes())
    data[int(images.source.index.columns["offset"][number]) + 200] ^= 255
    archive.write_bytes(data)
    with pytest.raises(UserError, match="checksum"):
        images[0]


def test_index_is_cached_while_the_folder_is_unchanged(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "run" / "data-index.safetensors"
    backdate(folder)
    first = open_source(str(folder), cache).index
    monkeypatch.setattr(FolderSource, "scan", lambda path: pytest.fail(f"scanned {path} again"))
    cached = open_source(str(folder), cache).index
    assert list(cached.names) == list(first.names)
    assert (cached.classes, cached.labels.tolist()) == (first.classes, first.labels.tolist())
    assert [part.tolist() for part in cached.split(0.3)] == [part.tolist() for part in first.split(0.3)]


@pytest.mark.parametrize("change", ["add", "remove", "rename", "new folder", "other folder", "damage", "just now"])
def test_index_is_rebuilt_after_a_change(folder: Path, tmp_path: Path, change: str) -> None:
    cache = tmp_path / "data-index.safetensors"
    if change != "just now":
        backdate(folder)
    path = folder
    assert len(open_source(str(folder), cache).index) == COUNT
    image = folder / "cat" / "00.jpg"
    if change == "add" or change == "just now":
        times = (folder / "cat").stat()
        (folder / "cat" / "new.jpg").write_bytes(image.read_bytes())
        if change == "just now":  # the change is within the resolution of the clock
            os.utime(folder / "cat", ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "remove":
        image.unlink()
    elif change == "rename":
        image.rename(image.with_name("renamed.jpg"))
    elif change == "new folder":
        (folder / "eel").mkdir()
        (folder / "eel" / "new.jpg").write_bytes(image.read_bytes())
    elif change == "other folder":
        path = folder / "cat"
    else:
        cache.write_bytes(cache.read_bytes()[:300])
    found = list(open_source(str(path), cache).index.names)
    assert found == sorted(p.relative_to(path).as_posix() for p in path.rglob("*.jpg"))


def test_string_table_is_compact_and_round_trips(tmp_path: Path) -> None:
    texts = ["", "a/b.png", "ü.png", "\udcff.png", "日本/語.jpg"]
    names = StringTable.from_strings(texts)
    assert list(names) == texts
    assert (names[-1], list(names[1:3]), list(names.take(np.array([3, 0])))) == (texts[-1], texts[1:3], [texts[3], ""])
    with pytest.raises(IndexError):
        names[5]
    many = ImageIndex.build([f"class{number % 100:03d}/{number:07d}.jpg" for number in range(20_000)])
    many.save(tmp_path / "index")
    loaded = ImageIndex.load(tmp_path / "index")
    assert loaded is not None
    assert loaded.names[12_345] == many.names[12_345]
    assert (tmp_path / "index").stat().st_size < 50 * 20_000
    assert len(pickle.dumps(loaded)) < 50 * 20_000


def test_torchvision_dataset_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Tiny(torchvision.datasets.VisionDataset):
        classes = ("air/plane", "car")
        targets = (1, 0) * 5

        def __init__(self, root: str, train: bool = False, download: bool = False) -> None:
            assert train
            assert not download
            if root != str(tmp_path):
                raise RuntimeError("Dataset not found or corrupted.")

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (8, 8), (index, 0, 0)), self.targets[index]

    monkeypatch.setattr(torchvision.datasets, "Tiny", Tiny, raising=False)
    images, _ = open_splits(f"torchvision:Tiny:{tmp_path}", size=8)
    assert images.classes == ("air-plane", "car")
    for index, name in enumerate(images.names):
        number = int(name[-8:])
        assert images[index].image[0].unique().tolist() == [number]
        assert images[index].label == Tiny.targets[number]
    with pytest.raises(
        UserError, match=r"cannot open Tiny in the folder 'data'.*download=True.*torchvision:Tiny:FOLDER"
    ):
        open_splits("torchvision:Tiny")
    with pytest.raises(UserError, match="torchvision has no data set 'Nothing'"):
        open_splits("torchvision:Nothing")


def test_missing_cifar10_gives_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Download it with") as error:
        open_splits(f"torchvision:CIFAR10:{tmp_path}")
    assert "\n" not in str(error.value)


def test_hugging_face_dataset_by_name(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match=r"pip install 'vqvae2\[huggingface\]'"):
            open_splits("huggingface:someone/images")
    files = sorted(folder.rglob("*.jpg"))

    class ClassLabel:
        names = ("cat", "dog")

    class ImageFeature:
        def __init__(self, decode: bool = True) -> None:
            self.decode = decode

    ImageFeature.__name__ = "Image"

    class Table:  # the part of datasets.Dataset that the source uses
        features = types.MappingProxyType({"image": ImageFeature(), "label": ClassLabel()})

        def __len__(self) -> int:
            return COUNT

        def cast_column(self, name: str, feature: ImageFeature) -> "Table":
            assert (name, feature.decode) == ("image", False)
            return self

        def __getitem__(self, key: str | int) -> object:
            if isinstance(key, str):
                return [ClassLabel.names.index(path.parent.name) for path in files]
            by_path = {"bytes": None, "path": str(files[key])}
            return {"image": by_path if key % 2 else {"bytes": files[key].read_bytes(), "path": None}}

    def load_dataset(name: str, split: str) -> Table:
        if name != "someone/images":
            raise FileNotFoundError(f"{name} doesn't exist on the Hub")
        assert split == "train"
        return Table()

    module = types.SimpleNamespace(load_dataset=load_dataset, Image=ImageFeature)
    monkeypatch.setitem(sys.modules, "datasets", module)  # pyright: ignore[reportArgumentType]
    images, _ = open_splits("huggingface:someone/images")
    by_folder = {path.stem: path for path in files}
    theirs = {
        name: image for part in open_splits(folder) for name, image in zip(part.names, load_all(part)[0], strict=True)
    }
    for index, name in enumerate(images.names):
        path = files[int(name[-8:])]
        assert images.classes[images[index].label] == path.parent.name
        assert torch.equal(images[index].image, theirs[f"{path.parent.name}/{by_folder[path.stem].name}"])
    with pytest.raises(UserError, match="cannot open 'nobody/nothing'"):
        open_splits("huggingface:nobody/nothing")


def test_hugging_face_dataset_saved_by_the_library(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own dependencies
        table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "c"))
        table.save_to_disk(str(tmp_path / "saved"))
    training, held_out = open_splits(f"huggingface:{tmp_path / 'saved'}")
    assert training.classes == ("cat", "dog")
    assert len(training) + len(held_out) == COUNT
    by_folder = open_splits(folder)
    pairs = [pair for part in by_folder for pair in zip(*load_all(part), strict=True)]
    expected = {image.numpy().tobytes(): int(label) for image, label in pairs}
    for part in (training, held_out):
        for image, label in zip(*load_all(part, num_workers=1), strict=True):
            assert expected.pop(image.numpy().tobytes()) == label
    assert not expected


def scanned(folder: Path) -> list[str]:
    return list(FolderSource.scan(str(folder)).names)


def test_folder_scan_visits_each_folder_once_and_skips_hidden_and_output_folders(
    tmp_path: Path, finished_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = images(tmp_path / "photos", 3)
    (photos / "loop").symlink_to(photos, target_is_directory=True)
    images(tmp_path / "elsewhere", 2)
    (photos / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (photos / "again").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    images(photos / ".ipynb_checkpoints", 2)
    shutil.copytree(finished_run, photos / "runs" / "x")
    for name in ("a.txt", "b.txt", "animation.psd"):
        (photos / name).write_text("not an image")
    assert scanned(photos) == ["0.png", "1.png", "2.png", "again/0.png", "again/1.png"]
    assert "3 other files skipped: .txt (2), .psd (1)" in caplog.text


def test_pipes_and_dangling_links_count_as_unreadable(tmp_path: Path) -> None:
    photos = images(tmp_path / "photos", 30)
    os.mkfifo(photos / "zz.png")
    (photos / "zy.png").symlink_to(tmp_path / "missing.png")
    config = DataConfig(path=str(photos), size=16, val_fraction=0.1, max_unreadable_fraction=0.5)
    for num_workers in (0, 1):
        for dataset in open_datasets(config):
            assert len(list(load_batches(dataset, SequentialBatchSampler(len(dataset), 5), num_workers))) > 0
    strict = config.model_copy(update={"max_unreadable_fraction": 0.0})
    training, _ = open_datasets(strict)
    with pytest.raises(UserError, match="not a regular file"):
        list(load_batches(training, SequentialBatchSampler(len(training), 5), 1))

"""Sources of images: every kind gives the same images, labels and split; an index is kept while nothing changes."""

import multiprocessing
import os
import pickle
import sys
import tarfile
import time
import types
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from vqvae2.data.images import DataConfig, ImageDataset, open_datasets
from vqvae2.data.index import ImageIndex, StringTable
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.data.sources import FolderSource, TarSource, open_source
from vqvae2.errors import UserError

COUNT = 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of small JPEGs."""
    root = tmp_path / "images"
    for number in range(COUNT):
        path = root / ("cat", "dog")[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 26, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (root / "notes.txt").write_text("no image")
    return root


def zipped(folder: Path, out: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(out, "w", method) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return out


def tarred(folder: Path, out: Path, mode: str = "w") -> Path:
    with tarfile.open(out, mode) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        archive.add(folder, ".")
    return out


def opened(path: object, **settings: object) -> tuple[ImageDataset, ImageDataset]:
    config = {"path": str(path), "size": 16, "labels": "folder", "val_fraction": 0.3, **settings}
    return open_datasets(DataConfig.from_dict(config, "test"))


def stacked(images: ImageDataset, num_workers: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(load_batches(images, SequentialBatchSampler(len(images), 5), num_workers))
    return torch.cat([batch.image for batch in batches]), torch.cat([batch.label for batch in batches])


def age(folder: Path, seconds: int = 100) -> None:
    """Make folders look as if nothing had changed in them for a while."""
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        before = path.stat().st_mtime_ns - seconds * 10**9
        os.utime(path, ns=(before, before))


@pytest.mark.parametrize("kind", ["stored zip", "deflated zip", "tar"])
def test_an_archive_gives_what_its_folder_gives(folder: Path, tmp_path: Path, kind: str) -> None:
    if kind == "tar":
        archive = tarred(folder, tmp_path / "images.tar")
    else:
        method = zipfile.ZIP_STORED if kind == "stored zip" else zipfile.ZIP_DEFLATED
        archive = zipped(folder, tmp_path / "images.zip", method)
    for ours, theirs in zip(opened(archive), opened(folder), strict=True):
        assert list(ours.names) == list(theirs.names)
        assert (ours.classes, ours.digest()) == (theirs.classes, theirs.digest())
        for one, other in zip(stacked(ours), stacked(theirs), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_archives_are_read_by_forked_and_spawned_workers(folder: Path, tmp_path: Path, method: str) -> None:
    archives = [opened(zipped(folder, tmp_path / "a.zip"))[0], opened(tarred(folder, tmp_path / "a.tar"))[0]]
    expected = [pixels(images) for images in archives]  # the files are open now, in this process
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(pixels, archives) == expected


def pixels(images: ImageDataset) -> bytes:
    return b"".join(images[index].image.numpy().tobytes() for index in range(len(images)))


def test_shards_are_one_source_with_classes_of_their_own(folder: Path, tmp_path: Path) -> None:
    files = sorted(folder.rglob("*.jpg"))
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard:04d}.tar", "w") as archive:
            for number, path in enumerate(files[shard::3]):
                archive.add(path, f"{number:03d}.jpg")  # keys begin anew in every shard
                label = tmp_path / "label"
                label.write_text("10" if path.parent.name == "cat" else "9")
                archive.add(label, f"{number:03d}.cls")
    images, held_out = opened(tmp_path / "{0000..0002}.tar")
    assert len(images) + len(held_out) == COUNT
    assert images.classes == ("9", "10")
    index = list(images.names).index("0001/002.jpg") if "0001/002.jpg" in set(images.names) else -1
    part, at = (images, index) if index >= 0 else (held_out, list(held_out.names).index("0001/002.jpg"))
    assert part.label(at) == (files[1 + 2 * 3].parent.name == "cat")
    with pytest.raises(UserError, match=r"no such archive: .*0003\.tar"):
        opened(tmp_path / "{0000..0003}.tar")


def test_archives_elsewhere_give_what_local_ones_give(folder: Path, tmp_path: Path) -> None:
    memory = MemoryFileSystem()
    for number, archive in enumerate((tarred(folder, tmp_path / "0.tar"), zipped(folder, tmp_path / "1.zip"))):
        memory.pipe_file(f"/archives/{archive.name}", archive.read_bytes())
        ours, theirs = opened(f"memory://archives/{archive.name}")[0], opened(archive)[0]
        assert ours.digest() == theirs.digest()
        assert all(map(torch.equal, stacked(ours), stacked(theirs))), number
    shards, _ = opened("memory://archives/{0..0}.tar")
    assert shards.digest() == opened("memory://archives/0.tar")[0].digest()
    with pytest.raises(UserError, match=r"no such archive: memory://archives/3\.tar"):
        opened("memory://archives/3.tar")
    with pytest.raises(UserError, match=r"cannot read nowhere://a/0\.tar \(Protocol not known"):
        opened("nowhere://a/0.tar")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_archives_elsewhere_are_read_by_forked_and_spawned_workers(folder: Path, tmp_path: Path, method: str) -> None:
    images, _ = opened(f"file://{tarred(folder, tmp_path / 'a.tar')}")
    expected = pixels(images)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(pixels, [images]) == [expected]


def test_the_index_of_an_archive_elsewhere_is_kept_until_it_is_replaced(folder: Path, tmp_path: Path) -> None:
    memory, address, cache = MemoryFileSystem(), "memory://kept/a.tar", tmp_path / "index"
    memory.pipe_file("/kept/a.tar", tarred(folder, tmp_path / "a.tar").read_bytes())
    assert len(open_source(address, cache).index) == COUNT
    with mock.patch.object(TarSource, "scan", side_effect=AssertionError("it is known")):
        assert len(open_source(address, cache).index) == COUNT
    (folder / "cat" / "00.jpg").unlink()
    memory.pipe_file("/kept/a.tar", tarred(folder, tmp_path / "b.tar").read_bytes())
    assert len(open_source(address, cache).index) == COUNT - 1


def test_a_request_that_fails_is_made_again_and_in_the_end_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = MemoryFileSystem()
    memory.pipe_file("/flaky/a.tar", tarred(folder, tmp_path / "a.tar").read_bytes())
    images, _ = opened("memory://flaky/a.tar")
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


def test_archives_that_cannot_be_used_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"no archive")
    (tmp_path / "no.tar").write_bytes(b"no archive" * 100)
    tarred(folder, tmp_path / "packed.tar.gz", "w:gz")
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
            opened(tmp_path / name)


def test_a_damaged_member_is_unreadable(folder: Path, tmp_path: Path) -> None:
    archive = zipped(folder, tmp_path / "images.zip", zipfile.ZIP_STORED)
    images, _ = opened(archive)
    number = int(images.indices[0])
    data = bytearray(archive.read_bytes())
    data[int(images.source.index.columns["offset"][number]) + 200] ^= 255
    archive.write_bytes(data)
    with pytest.raises(UserError, match="checksum"):
        images[0]


def test_an_index_is_kept_while_the_folder_stays_as_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "run" / "data-index.safetensors"
    age(folder)
    first = open_source(str(folder), cache).index
    monkeypatch.setattr(FolderSource, "scan", lambda path: pytest.fail(f"scanned {path} again"))
    again = open_source(str(folder), cache).index
    assert list(again.names) == list(first.names)
    assert (again.classes, again.labels.tolist()) == (first.classes, first.labels.tolist())
    assert [part.tolist() for part in again.split(0.3)] == [part.tolist() for part in first.split(0.3)]


@pytest.mark.parametrize("change", ["add", "remove", "rename", "new folder", "other folder", "damage", "just now"])
def test_an_index_is_made_anew_when_something_changed(folder: Path, tmp_path: Path, change: str) -> None:
    cache = tmp_path / "data-index.safetensors"
    if change != "just now":
        age(folder)
    path = folder
    assert len(open_source(str(folder), cache).index) == COUNT
    image = folder / "cat" / "00.jpg"
    if change == "add" or change == "just now":
        times = (folder / "cat").stat()
        (folder / "cat" / "new.jpg").write_bytes(image.read_bytes())
        if change == "just now":  # a clock that ticks too slowly to see it
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


def test_names_are_compact_and_come_back(tmp_path: Path) -> None:
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


def test_torchvision_data_sets_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
    images, _ = opened(f"torchvision:Tiny:{tmp_path}", size=8)
    assert images.classes == ("air-plane", "car")
    for index, name in enumerate(images.names):
        number = int(name[-8:])
        assert images[index].image[0].unique().tolist() == [number]
        assert images[index].label == Tiny.targets[number]
    with pytest.raises(
        UserError, match=r"cannot open Tiny in the folder 'data'.*download=True.*torchvision:Tiny:FOLDER"
    ):
        opened("torchvision:Tiny")
    with pytest.raises(UserError, match="torchvision has no data set 'Nothing'"):
        opened("torchvision:Nothing")


def test_cifar10_that_was_not_downloaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Download it with") as error:
        opened(f"torchvision:CIFAR10:{tmp_path}")
    assert "\n" not in str(error.value)


def test_hugging_face_data_sets_by_name(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match=r"pip install 'vqvae2\[huggingface\]'"):
            opened("huggingface:someone/images")
    files = sorted(folder.rglob("*.jpg"))

    class ClassLabel:
        names = ("cat", "dog")

    class ImageFeature:
        def __init__(self, decode: bool = True) -> None:
            self.decode = decode

    ImageFeature.__name__ = "Image"

    class Table:  # the part of datasets.Dataset that we use
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
    images, _ = opened("huggingface:someone/images")
    by_folder = {path.stem: path for path in files}
    theirs = {name: image for part in opened(folder) for name, image in zip(part.names, stacked(part)[0], strict=True)}
    for index, name in enumerate(images.names):
        path = files[int(name[-8:])]
        assert images.classes[images[index].label] == path.parent.name
        assert torch.equal(images[index].image, theirs[f"{path.parent.name}/{by_folder[path.stem].name}"])
    with pytest.raises(UserError, match="cannot open 'nobody/nothing'"):
        opened("huggingface:nobody/nothing")

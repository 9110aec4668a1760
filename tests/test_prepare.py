"""Test `vqvae2 prepare` and `vqvae2 inspect`: stored records, resuming after a kill, and errors."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from sampling.report.inspect_store import main as inspect_main
from tests.test_code_store import header as code_header
from tests.test_code_store import write as write_codes
from tests.test_lmdb_environment import rewrite
from train.stages.prepare import main as prepare_main
from vqvae2.command_line import run_command
from vqvae2.data import lmdb_environment
from vqvae2.data.images import DataConfig
from vqvae2.data.index import ImageIndex, StringTable
from vqvae2.data.sources.prepared import read_header
from vqvae2.data.splits import open_datasets
from vqvae2.errors import UserError


def prepare(arguments: list[str]) -> None:
    run_command(prepare_main, arguments, "vqvae2 prepare")


def inspect(arguments: list[str]) -> None:
    run_command(inspect_main, arguments, "vqvae2 inspect")


def fill(folder: Path, count: int = 12) -> Path:
    for number in range(count):
        path = folder / ("cat", "dog")[number % 2] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def records(path: Path) -> dict[bytes, bytes]:
    lmdb_environment.close_reader(path)
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return dict(transaction.cursor())


@pytest.mark.parametrize(("encoding", "error"), [("raw", 0), ("png", 0), ("jpeg", 30), ("webp", 30)])
def test_prepared_images_match_the_folder(tmp_path: Path, encoding: str, error: int) -> None:
    folder, out = fill(tmp_path / "images"), tmp_path / "out"
    prepare([str(folder), str(out), "--size", "16", "--format", encoding, "--num-workers", "0"])
    settings = {"size": 16, "labels": "folder", "val_fraction": 0.3}
    config = DataConfig.from_dict({"path": str(folder), **settings}, "test")
    for ours, theirs in zip(
        open_datasets(config.model_copy(update={"path": str(out)})), open_datasets(config), strict=True
    ):
        assert list(ours.names) == list(theirs.names)
        assert (ours.classes, ours.digest()) == (theirs.classes, theirs.digest())
        for index, item in enumerate(ours):
            resized = Image.open(folder / theirs.names[index]).resize(
                (27, 16), Image.Resampling.BICUBIC, reducing_gap=3
            )
            expected = np.asarray(resized.crop((6, 0, 22, 16))).astype(int)
            assert np.abs(item.image.permute(1, 2, 0).numpy() - expected).mean() <= error
            if index == len(ours) - 1:
                break


def test_random_crops_reach_the_edges_of_prepared_images(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare([str(fill(tmp_path / "images")), str(out), "--size", "16", "--format", "png", "--num-workers", "0"])
    images, _ = open_datasets(DataConfig(path=str(out), size=16, crop="random"))
    assert len({images[0, draw].image.numpy().tobytes() for draw in range(60)}) == 12  # 27 − 16 + 1 positions


def test_prepared_images_are_neither_enlarged_nor_given_channels(tmp_path: Path) -> None:
    prepare([str(fill(tmp_path / "images")), str(tmp_path / "out"), "--size", "8", "--num-workers", "0"])
    assert len(open_datasets(DataConfig(path=str(tmp_path / "out"), size=(8, 4), channels=1))[0]) > 0
    for settings, message in (
        ({"size": (8, 16)}, r"data\.size: .*out was prepared for 8 × 8 pixels, less than 8 × 16"),
        ({"size": 8, "channels": 4}, r"data\.channels: .*out was prepared with 3, not 4"),
    ):
        with pytest.raises(UserError, match=message):
            open_datasets(DataConfig.from_dict({"path": str(tmp_path / "out"), **settings}, "test"))


def test_killed_prepare_resumes_to_the_same_records(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", 200)
    (folder / "dog" / "0071.png").write_text("not an image")
    out = tmp_path / "killed"
    command = [str(folder), str(out), "--size", "16", "--num-workers", "1"]
    slow = (
        "import sys, time; from vqvae2.data.sources.prepared import PreparedWriter as W\n"
        "import train.stages.prepare as p\n"
        "write = W.write\n"
        "def slowly(*a): write(*a); print('written', flush=True); time.sleep(60)\n"
        "W.write = slowly; p.main(p.PrepareOptions.from_arguments(sys.argv[1:], 'x'))"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)  # returns when the worker exits too and closes the inherited pipes
    with pytest.raises(UserError, match=r"is unfinished\. Run the same `vqvae2 prepare` again"):
        open_datasets(DataConfig(path=str(out), size=16))
    assert len(records(out)) == 1 + 64
    prepare(command)
    uninterrupted = tmp_path / "uninterrupted"
    prepare([str(folder), str(uninterrupted), "--size", "16", "--num-workers", "0"])
    assert records(out) == records(uninterrupted)
    assert (out / "index.safetensors").read_bytes() == (uninterrupted / "index.safetensors").read_bytes()
    header = read_header(out)
    assert (header.count, header.unreadable, header.classes) == (200, ("dog/0071.png",), ("cat", "dog"))
    training, validation = open_datasets(DataConfig(path=str(out), size=16))
    assert len(training) + len(validation) == 199
    before = records(out)
    prepare(command)  # complete, so this does nothing
    assert records(out) == before


def test_full_disk_at_the_start_leaves_a_folder_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    command = [str(fill(tmp_path / "images")), str(tmp_path / "out"), "--size", "16", "--num-workers", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match="No space left on device"):
            prepare(command)
    (tmp_path / "out" / ".seal.json.host.1.partial").write_text("")
    prepare(command)
    assert len(records(tmp_path / "out")) == 1 + 12


def test_invalid_arguments_raise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = fill(tmp_path / "images"), tmp_path / "out"
    common = [str(folder), str(out), "--num-workers", "0"]
    prepare([*common, "--size", "16"])
    with pytest.raises(UserError, match="another source, size or format"):
        prepare([*common, "--size", "24"])
    with pytest.raises(UserError, match="not empty and not prepared images"):
        prepare([str(folder), str(folder), "--size", "16", "--num-workers", "0"])
    with pytest.raises(UserError, match="jpeg has no transparency"):
        prepare([str(folder), str(tmp_path / "x"), "--size", "16", "--channels", "4"])
    with pytest.raises(UserError, match=r"quality.*less than or equal to 100"):
        prepare([str(folder), str(tmp_path / "x"), "--size", "16", "--quality", "101"])
    for size in (["0"], ["16", "0"], ["99999999"]):
        with pytest.raises(UserError, match=r"^--size: Input should be"):
            prepare([str(folder), str(tmp_path / "x"), "--size", *size])
    with pytest.raises(UserError, match="vqvae2 prepare: path: has control characters"):
        prepare(["bad\nname", str(tmp_path / "x"), "--size", "16"])
    (folder / "dog" / "0001.png").write_text("not an image")
    with pytest.raises(UserError, match=r"1 of 12 images .*0001\.png"):
        prepare([str(folder), str(tmp_path / "y"), "--size", "16", "--num-workers", "0"])
    write_codes(tmp_path / "codes", code_header(3, (4, 2, 2)))
    with pytest.raises(UserError, match=r"is a code store\. Give images"):
        open_datasets(DataConfig(path=str(tmp_path / "codes"), size=16))
    capsys.readouterr()
    with pytest.raises(UserError, match="neither a code store nor prepared images"):
        inspect([str(folder)])


def test_inspect_prints_code_store_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps, labels = write_codes(tmp_path / "train", code_header(70, (300, 3, 2), (4, 1, 1), classes=tuple("abcde")))
    inspect([str(tmp_path / "train")])
    text = capsys.readouterr().out
    probabilities = torch.bincount(maps[1].flatten(), minlength=4).double() / 70
    entropy = float(-(probabilities * probabilities.log()).sum())
    assert "70 in split train" in text
    assert f"top           1×1, codebook size 4: usage 100.0%, entropy {entropy:.3f} nats" in text
    assert f"bottom        3×2, codebook size 300: usage {len(maps[0].unique()) / 300:.1%}" in text
    assert f"classes       5: a {int((labels == 0).sum())}, b {int((labels == 1).sum())}" in text
    with Image.open(tmp_path / "train.png") as picture:
        assert picture.width > 2.5 * picture.height, "a panel for each level and one for the classes"


def test_inspect_prints_prepared_image_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill(tmp_path / "images")
    shutil.copy(folder / "dog" / "0001.png", folder)  # without a class
    prepare([str(folder), str(tmp_path / "out"), "--size", "16", "--num-workers", "0"])
    capsys.readouterr()
    inspect([str(tmp_path / "out"), "--out", str(tmp_path / "grid.png")])
    text = capsys.readouterr().out
    for words in ("13, resized to cover 16×16, jpeg, quality 95", "2: cat 6, dog 6", "unreadable    none"):
        assert words in text
    assert (tmp_path / "grid.png").is_file()


def test_inspect_keeps_existing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_codes(tmp_path / "train", code_header(7, (4, 1, 1)))
    photo = tmp_path / "train.png"
    photo.write_bytes(b"a photograph")
    with pytest.raises(UserError, match=r"train\.png: already exists"):
        inspect([str(tmp_path / "train"), "--out", str(photo)])
    for number in (2, 3):
        inspect([str(tmp_path / "train")])
        assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / f"train-{number}.png")
    assert photo.read_bytes() == b"a photograph"


def test_inspect_names_the_picture_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_codes(tmp_path / "train", code_header(7, (4, 1, 1)))
    monkeypatch.chdir(tmp_path / "train")
    inspect(["."])
    assert (tmp_path / "train.png").is_file()


def test_hostile_header_and_index_of_prepared_images_are_refused(tmp_path: Path) -> None:
    folder, out = fill(tmp_path / "images"), tmp_path / "out"
    prepare([str(folder), str(out), "--size", "16", "--num-workers", "0"])
    config = DataConfig.from_dict({"path": str(out), "size": 16}, "test")
    for changes, words in (
        ({"count": -1}, "count"),
        ({"count": 10**12}, r"missing or corrupted index\.safetensors"),
        ({"unreadable": ["a"]}, r"missing or corrupted index\.safetensors"),
        ({"classes": ["cat"]}, r"missing or corrupted index\.safetensors"),
        ({"size": [10**9, 16]}, "size"),
        ({"kind": 3}, "another LMDB database"),
    ):
        original = records(out)[b"header"]
        rewrite(out, lambda header, changes=changes: header.update(changes))
        with pytest.raises(UserError, match=words):
            open_datasets(config)
        rewrite(out, lambda _, original=original: json.loads(original))
    index = ImageIndex.load(out / "index.safetensors")
    assert index is not None
    for changed in (
        dataclasses.replace(index, columns={"position": index.columns["position"] + 1}),
        dataclasses.replace(index, columns={}),
        dataclasses.replace(index, labels=index.labels + 2),
        dataclasses.replace(index, hashes=index.hashes[1:]),
        dataclasses.replace(index, names=StringTable(index.names.text, index.names.ends[::-1])),
    ):
        changed.save(out / "index.safetensors")
        with pytest.raises(UserError, match=r"missing or corrupted index\.safetensors"):
            open_datasets(config)

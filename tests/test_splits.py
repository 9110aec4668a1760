"""Training and validation images: of two sources, of lists, or of one source that is split."""

import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from sampling.evaluation.image_sets import open_image_set
from tests.conftest import TINY
from tests.test_commands import fails
from tests.test_commands import images as image_files
from vqvae2.__main__ import main
from vqvae2.data.image_io import read_image
from vqvae2.data.images import DataConfig, ImageDataset
from vqvae2.data.splits import open_datasets
from vqvae2.errors import UserError
from vqvae2.pictures import hwc_to_chw


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Return a folder with the classes a, b and c, and one with the classes b and c."""
    train, val = tmp_path / "train", tmp_path / "val"
    for name in "abc":
        image_files(train / name, 3)
    for name in "bc":
        image_files(val / name, 2)
    return train, val


def open_splits(path: object, val_path: object, **settings: object) -> tuple[ImageDataset, ImageDataset]:
    config = {"path": str(path), "val_path": val_path and str(val_path), "size": 8, **settings}
    return open_datasets(DataConfig.from_dict(config, "test"))


def test_two_folders_share_the_classes_of_the_training_images(folders: tuple[Path, Path], tmp_path: Path) -> None:
    cache = tmp_path / "index.safetensors"
    config = DataConfig(path=str(folders[0]), val_path=str(folders[1]), size=8, labels="folder")
    for _ in range(2):
        training, held_out = open_datasets(config, cache)
        assert (len(training), len(held_out)) == (9, 4)
        assert training.classes == held_out.classes == ("a", "b", "c")
        assert [held_out[index].label for index in range(4)] == [1, 1, 2, 2]
        assert list(held_out.names) == ["b/0.png", "b/1.png", "c/0.png", "c/1.png"]
    assert cache.is_file()
    assert cache.with_stem("index-val").is_file()


def test_lists_of_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, _ = folders
    names = sorted(os.path.relpath(path, tmp_path) for path in train.rglob("*.png"))
    (tmp_path / "train.txt").write_text("\ufeff" + "\r\n".join(names[2:]) + "\n\n", encoding="utf-8")
    (tmp_path / "val.txt").write_text("\n".join(str(tmp_path / name) for name in names[:2]))
    training, held_out = open_splits(tmp_path / "train.txt", tmp_path / "val.txt")
    assert list(training.names) == names[2:]
    assert len(held_out) == 2
    image = read_image(tmp_path / names[2], (8, 8))
    assert torch.equal(training[0].image, hwc_to_chw(image))
    labeled, _ = open_splits(tmp_path / "train.txt", tmp_path / "val.txt", labels="none")
    assert labeled.classes == ()
    classes, _ = open_datasets(DataConfig(path=str(tmp_path / "train.txt"), size=8, labels="folder"))
    assert classes.classes == ("a", "b", "c"), "the first folder that not all images are in"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no images in"),
        ("train/a/0.png\ntrain/a/../a/0.png\n", "line 2: train/a/0.png is listed twice"),
        ("gone.png\n", "no such file: gone.png. Paths in a list are absolute, or relative to the folder"),
    ],
)
def test_invalid_lists_raise(folders: tuple[Path, Path], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        open_datasets(DataConfig(path=str(tmp_path / "list.txt"), size=8))
    with pytest.raises(UserError, match=r"data\.val_path: "):
        open_splits(folders[0], tmp_path / "list.txt")


def test_missing_files_of_a_list_count_as_unreadable(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("train/a/0.png\ntrain/a/8.png\ntrain/b/0.png\n")
    training, _ = open_splits(tmp_path / "list.txt", folders[1])
    with pytest.raises(UserError, match=r"train/a/8\.png \(no such file\)"):
        training.read(1)


def test_validation_images_must_be_others_with_known_classes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, val = folders
    with pytest.raises(UserError, match=r"data\.val_path: 9 images of .*train are also training images, for example"):
        open_splits(train, train)
    (tmp_path / "val.txt").write_text("train/b/1.png\nval/b/1.png\n")
    with pytest.raises(UserError, match=r"1 images of .*val.txt are also training images, for example .*train/b/1.png"):
        open_splits(train, tmp_path / "val.txt")
    (tmp_path / "link").symlink_to(train)
    for again in (tmp_path / "link", train / ".." / "train"):
        with pytest.raises(UserError, match=r"data\.val_path: 9 images of .* are also training images"):
            open_splits(train, again)
    image_files(val / "zebra", 1)
    with pytest.raises(UserError, match=r"has the classes zebra, but the training images do not"):
        open_splits(train, val, labels="folder")
    assert len(open_splits(train, val)[1]) == 5
    with pytest.raises(UserError, match=r"data\.val_path: no such folder"):
        open_splits(train, tmp_path / "gone")


def test_shards_and_mazes_in_both_splits_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, _ = folders
    for number, name in enumerate("abc"):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            archive.add(train / name, name)
    for other in ("{1..2}.tar", "1.tar"):
        with pytest.raises(UserError, match=r"3 images of .*tar are also training images, for example .*b/0.png"):
            open_splits(tmp_path / "{0..1}.tar", tmp_path / other, labels="none")
    assert len(open_splits(tmp_path / "{0..1}.tar", tmp_path / "2.tar", labels="none")[1]) == 3
    with pytest.raises(UserError, match=r"6 images of mazes:2:3 are also training images"):
        open_splits("mazes:4:3", "mazes:2:3")


def test_shards_of_the_same_name_have_different_image_names(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        (tmp_path / f"part{number}").mkdir()
        with tarfile.open(tmp_path / f"part{number}" / "train.tar", "w") as archive:
            archive.add(folders[0] / name, "x")
    shards = tmp_path / "part{0..1}" / "train.tar"
    names = set().union(*(part.names for part in open_splits(shards, None, labels="none")))
    assert names == {f"part{part}/train/x/{number}.png" for part in range(2) for number in range(3)}
    reference = open_image_set(shards)
    assert reference.digest() != open_image_set(tmp_path / "part0" / "train.tar").digest()
    assert len(reference) == 6


def test_a_run_with_a_folder_for_validation(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, val = folders
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = ["train-autoencoder", "tiny.yaml", "--run", "run", "--data.path", "train", "--data.val-path", "val"]
    assert main(command) == 0
    assert main(["extract-codes", "tiny.yaml", *command[2:]]) == 0
    capsys.readouterr()
    assert main(["inspect", "run/codes/val"]) == 0
    assert "4" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "codes")
    command[0] = "extract-codes"
    moved = shutil.copytree(val, tmp_path / "moved")
    assert main([*command[:-1], str(moved)]) == 0, "the same images in another place"
    other = shutil.copytree(val, tmp_path / "other")
    shutil.copy(val / "b" / "0.png", other / "b" / "new.png")
    fails(capsys, [*command[:-1], str(other)], "does not hold the images")  # although its codes are complete
    shutil.copy(val / "b" / "0.png", moved / "b" / "new.png")
    shutil.rmtree(tmp_path / "run" / "codes")
    fails(capsys, [*command[:-1], str(moved)], "does not hold the images")

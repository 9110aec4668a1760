"""The command `vqvae2 reconstruct` with a folder or an archive."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.test_commands import contents, fails
from tests.test_commands import images as image_files
from vqvae2 import Autoencoder
from vqvae2.__main__ import main
from vqvae2.data.image_io import read_image
from vqvae2.data.images import to_float, to_uint8
from vqvae2.pictures import hwc_to_chw, load_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with 10 images, one of them in a subfolder."""
    found = image_files(tmp_path / "images", 10)
    (found / "inner").mkdir()
    (found / "3.png").rename(found / "inner" / "3.png")
    return found


def test_folders_and_archives_are_reconstructed_image_by_image(
    finished_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", folder)
    model = Autoencoder.from_pretrained(finished_run)
    for number, source in enumerate((folder, archive)):
        out = tmp_path / f"out-{number}"
        assert main(["reconstruct", str(finished_run), str(source), "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"{out}: 10 images\n"
        assert len(list(out.rglob("*.png"))) == 10
        for name in ("0.png", "inner/3.png"):
            image = hwc_to_chw(read_image(folder / name, model.size))
            expected = to_uint8(model.reconstruct(to_float(image[None])))[0]
            difference = expected.int() - load_image(out / name).int()
            assert difference.abs().max() <= 1, "rounding may depend on the batch"


def test_nothing_is_overwritten_or_left_incomplete(
    finished_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reconstruct", str(finished_run), str(folder), "--out"]
    fails(capsys, [*command, str(folder)], str(folder), "not empty", "--out")
    shutil.copy(folder / "0.png", folder / "0.bmp")
    fails(capsys, [*command, str(tmp_path / "out")], "another image is also named 0.png. Rename one of them.")
    (folder / "0.bmp").unlink()
    (folder / "1.png").write_bytes(b"damaged")
    fails(capsys, [*command, str(tmp_path / "out")], "1 of 10 images cannot be read", "1.png")
    assert not (tmp_path / "out").exists()
    fails(capsys, [*command, str(tmp_path / "out"), "--levels"], "--levels", "image files")
    fails(capsys, ["reconstruct", str(finished_run), str(tmp_path / "gone")], "gone", "no such folder")


def test_small_images_of_other_shapes_are_resized_and_cropped(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (50, 70), (200, 30, 60)).save(tmp_path / "images" / "tall.png")
    assert main(["reconstruct", str(finished_run), str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 0
    assert load_image(tmp_path / "out" / "tall.png").shape == torch.Size([3, 32, 32])


def test_images_of_a_list_are_written_inside_the_output_folder(
    finished_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists, out, prepared = tmp_path / "lists", tmp_path / "deep" / "out", tmp_path / "prepared"
    lists.mkdir()
    names = [str(folder / "0.png"), "../images/1.png", "../images/inner/3.png"]
    (lists / "list.txt").write_text("\n".join(names))
    assert main(["prepare", str(lists / "list.txt"), str(prepared), "--size", "32", "--num-workers", "0"]) == 0
    before = contents(tmp_path)
    written = {f"{str(folder)[1:]}/0.png", "images/1.png", "images/inner/3.png"}
    for source in (lists / "list.txt", prepared):
        assert main(["reconstruct", str(finished_run), str(source), "--out", str(out)]) == 0
        assert contents(out).keys() == written
        shutil.rmtree(out)
        assert contents(tmp_path) == before
    (lists / "images").mkdir()
    shutil.copy(folder / "1.png", lists / "images")
    (lists / "list.txt").write_text("images/1.png\n../images/1.png")
    command = ["reconstruct", str(finished_run), str(lists / "list.txt"), "--out", str(out)]
    fails(capsys, command, "another image is also named images/1.png")
    assert not out.exists()


def test_existing_pictures_are_kept(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    photo, other = sorted(image_files(tmp_path / "images", 2).iterdir())
    before = contents(tmp_path)
    command = ["reconstruct", str(run), str(photo)]
    fails(capsys, [*command, "--out", str(other)], f"{other}: already exists. Choose another name or delete it.")
    fails(capsys, [*command, "--out", str(tmp_path / "x.jpg")], "x.jpg: pictures are written as PNG", "ends in .png")
    fails(capsys, ["inspect", str(run / "codes" / "val"), "--out", str(tmp_path / "x.jpg")], "ends in .png")
    fails(capsys, ["inspect", str(run / "codes")], f"Did you mean {run / 'codes' / 'train'}, {run / 'codes' / 'val'}?")
    fails(capsys, [*command, str(photo.parent)], f"{photo.parent}: is a folder")
    assert contents(tmp_path) == before
    names = ["reconstructions.png", "reconstructions-2.png", "reconstructions-3.png"]
    for name in names:
        assert main(command) == 0
        assert capsys.readouterr().out.splitlines()[0] == str(run / name)
    for name in ("reconstructions", "reconstructions-2"):
        assert main(["reconstruct", str(run), str(photo.parent)]) == 0
        assert capsys.readouterr().out == f"{run / name}: 2 images\n"
    assert contents(tmp_path).items() >= before.items()


def test_a_path_that_cannot_be_printed_gives_a_one_line_error(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, ["reconstruct", str(finished_run), "bad\nname"], "vqvae2 reconstruct: path: has control characters")

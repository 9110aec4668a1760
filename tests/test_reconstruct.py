"""The command `vqvae2 reconstruct` with a folder or an archive."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.test_commands import fails
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
    fails(capsys, [*command, str(tmp_path / "out")], "0.png", "same name without its suffix")
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

"""Test the output folder of sampling: the image grid, the class grid, and the throughput summary."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sampling.evaluation.image_sets import open_image_set
from sampling.output_folder import SampleManifest, image_path, read_manifest, write_grids
from tests.test_commands import contents, fails
from vqvae2.__main__ import main
from vqvae2.pictures import load_image, save_curves, save_image, save_rows


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_save_rows_draws_captions_and_rows_of_different_lengths(tmp_path: Path, channels: int) -> None:
    images = torch.full((3, channels, 32, 32), 100, dtype=torch.uint8)
    save_rows(tmp_path / "rows.png", {"a cat": images, "caf\udce9": images[:1]})
    with Image.open(tmp_path / "rows.png") as picture:
        pixels = np.array(picture.convert("RGB")).astype(int)
    margin = pixels.shape[1] - (3 * 98 + 2)
    assert pixels.shape[0] == 2 * 98 + 2
    assert margin > 30
    for row in range(2):  # each caption is dark on white and within its row
        band = pixels[2 + 98 * row : 98 * (row + 1), :margin]
        assert band.min() < 60
        assert (band[:20] == 255).all()
        assert (band[-20:] == 255).all()
    shown = pixels[:, margin:]
    assert (shown[2:98, 2:98] == 100).all()
    assert (shown[100:196, 2:98] == 100).all()
    if channels < 4:
        assert (shown[100:196, 100:] == 255).all()


def test_captions_have_accents_and_single_points_of_curves_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for name in "řő":  # a font without them draws the same box for both
        save_rows(tmp_path / f"{name}.png", {name: images})
    assert not torch.equal(*(load_image(tmp_path / f"{name}.png")[..., :16] for name in "řő"))
    figures = []
    monkeypatch.setattr("vqvae2.pictures.save_figure", lambda path, figure: figures.append(figure))
    save_curves(
        tmp_path / "curves.png",
        {"NLL": {"one": [(1.0, 2.0)], "many": [(float(step), 2.0) for step in range(50)]}},
        "title",
    )
    assert [line.get_marker() for line in figures[0].axes[0].lines] == ["o", ""]


def test_class_grid_has_one_row_per_class(tmp_path: Path) -> None:
    labels = [2, 0, 2, 1, 2]
    for number, label in enumerate(labels):
        save_image(image_path(tmp_path, number), torch.full((3, 96, 96), 40 + 50 * label, dtype=torch.uint8))
    write_grids(tmp_path, 5, labels, ("same", "other", "same"))
    with Image.open(tmp_path / "classes.png") as picture:
        pixels = np.array(picture).astype(int)[:, -(3 * 98 + 2) :]
    for row, (label, count) in enumerate([(2, 3), (0, 1), (1, 1)]):
        for column in range(3):
            found = pixels[2 + 98 * row : 98 * (row + 1), 2 + 98 * column : 98 * (column + 1)]
            assert (found == (40 + 50 * label if column < count else 255)).all()
    (tmp_path / "classes.png").unlink()
    write_grids(tmp_path, 5, None, ())
    assert not (tmp_path / "classes.png").exists()


def test_sample_reports_throughput_and_makes_grids_again(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    grids = {name: (run / "samples" / name).read_bytes() for name in ("grid.png", "classes.png")}
    (run / "samples" / "classes.png").unlink()
    (run / "samples" / "grid.png").write_bytes(b"")
    assert main(["sample", str(run)]) == 0
    assert {name: (run / "samples" / name).read_bytes() for name in grids} == grids
    assert "images/s" not in capsys.readouterr().err  # nothing was sampled
    assert main(["sample", str(run), "--seed", "4", "--count", "3", "--memory", "0.5"]) == 0
    assert "samples: 3 images in " in capsys.readouterr().err
    summary = json.loads((run / "samples-2" / "summary.json").read_text())
    assert summary["images"] == 3
    assert summary["images_per_second"] > 0


def test_npz_holds_all_images_and_is_added_to_existing_samples(finished_run: Path, tmp_path: Path) -> None:
    command = ["sample", str(finished_run), "--count", "5", "--out", str(tmp_path / "samples")]
    assert main(command) == 0
    assert not (tmp_path / "samples" / "samples.npz").exists()
    assert main([*command, "--format", "npz"]) == 0
    with np.load(tmp_path / "samples" / "samples.npz") as archive:
        assert list(archive) == ["arr_0"]
        found = archive["arr_0"]
    expected = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "samples" / "images").iterdir())]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.stack(expected))
    assert len(open_image_set(tmp_path / "samples" / "samples.npz")) == 5


def test_foreign_folder_is_refused_and_damaged_images_are_sampled_again(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", str(finished_run), "--count", "3", "--out"]
    foreign = tmp_path / "foreign" / "images"
    foreign.mkdir(parents=True)
    (foreign / "000001.png").write_bytes(b"a picture of the user")
    fails(capsys, [*command, str(foreign.parent)], str(foreign.parent), "not empty")
    assert (foreign / "000001.png").read_bytes() == b"a picture of the user"
    assert len(list(foreign.parent.iterdir())) == 1
    out = tmp_path / "out"
    assert main([*command, str(out)]) == 0
    files = {path: path.read_bytes() for path in (out / "images").iterdir()}
    (out / "images" / "000000.png").write_bytes(b"")
    (out / "images" / "000001.png").write_bytes(files[out / "images" / "000001.png"][:-7])
    save_image(out / "images" / "000002.png", torch.zeros(1, 32, 32, dtype=torch.uint8))  # gray
    assert main([*command, str(out)]) == 0
    assert {path: path.read_bytes() for path in (out / "images").iterdir()} == files


@pytest.mark.parametrize("text", ["null", "{}", '{"count": 3}', "[[]]"])
def test_folder_with_an_invalid_manifest_is_refused_and_unchanged(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    out = shutil.copytree(finished_run / "samples", tmp_path / "out")
    (out / "manifest.json").write_text(text)
    before = contents(out)
    fails(capsys, ["sample", str(finished_run), "--out", str(out)], "manifest.json", "choose another folder")
    assert contents(out) == before


def test_webp_samples_are_lossless_and_resume(finished_run: Path, tmp_path: Path) -> None:
    command = ["sample", str(finished_run), "--count", "3", "--out", str(tmp_path / "out"), "--format", "webp"]
    assert main(command) == 0
    images = [tmp_path / "out" / "images" / f"{number:06d}.webp" for number in range(3)]
    for number, path in enumerate(images):
        assert torch.equal(load_image(path), load_image(image_path(finished_run / "samples", number)))
    before = [path.read_bytes() for path in images]
    images[0].unlink()
    images[1].write_bytes(before[1][:-9])
    Image.new("RGB", (16, 16)).save(images[2], lossless=True)
    assert main(command) == 0
    assert [path.read_bytes() for path in images] == before
    manifest = read_manifest(tmp_path / "out", SampleManifest)
    assert manifest is not None
    assert manifest.format == "webp"


def test_webp_keeps_colors_of_transparent_pixels(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (4, 9, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image[3] %= 2
    save_image(tmp_path / "a.webp", image)
    assert torch.equal(load_image(tmp_path / "a.webp"), image)

"""Test image datasets: split, labels, resizing and cropping, augmentation, and unreadable files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqvae2.data.images import DataConfig, read_image, to_float, to_uint8
from vqvae2.data.splits import open_datasets
from vqvae2.errors import UserError


def write_image(path: Path, width: int = 40, height: int = 30, mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    Image.fromarray(pixels).convert("RGB").convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number in range(60):
        write_image(root / ("cat", "dog", "eel")[number % 3] / "deep" / f"{number}.png", seed=number)
    (root / "notes.md").write_text("not an image")
    (root / ".hidden.png").write_text("not an image")
    return root


def test_split_is_stable_when_files_are_added(folder: Path) -> None:
    config = DataConfig(path=str(folder), size=16, val_fraction=0.3)
    training, validation = open_datasets(config)
    assert len(training) + len(validation) == 60
    assert 5 < len(validation) < 35
    before = set(validation.names)
    for number in range(60, 90):
        write_image(folder / "fox" / f"{number}.png", seed=number)
    _, later = open_datasets(config)
    assert before == {name for name in later.names if not name.startswith("fox")}


def test_each_split_has_at_least_one_image(tmp_path: Path) -> None:
    for number in range(2):
        write_image(tmp_path / f"{number}.png", seed=number)
    training, validation = open_datasets(DataConfig(path=str(tmp_path), size=16, val_fraction=0.001))
    assert (len(training), len(validation)) == (1, 1)


def test_labels_are_the_first_path_component(folder: Path) -> None:
    training, _ = open_datasets(DataConfig(path=str(folder), size=16, labels="folder"))
    assert training.classes == ("cat", "dog", "eel")
    for index, name in enumerate(training.names):
        assert training.classes[training[index].label] == name.split("/")[0]
    unlabeled, _ = open_datasets(DataConfig(path=str(folder), size=16))
    assert unlabeled.classes == ()
    assert unlabeled[0].label == -1


def test_resize_covers_the_size_and_crops_the_center(tmp_path: Path) -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :20], pixels[:, 20:60], pixels[:, 60:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "bands.png")
    center = read_image(tmp_path / "bands.png", (20, 20))
    assert (center[:, 2:-2] == (0, 255, 0)).all()
    left = read_image(tmp_path / "bands.png", (20, 20), crop_position=(0.0, 0.0))
    assert (left[:, :8] == (255, 0, 0)).all()


def test_resize_is_antialiased_and_matches_torch(tmp_path: Path) -> None:
    path = write_image(tmp_path / "noise.png", 64, 64)
    ours = read_image(path, (16, 16)).astype(float)
    tensor = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float()
    theirs = torch.nn.functional.interpolate(tensor, size=16, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    np.testing.assert_allclose(ours, theirs.clamp(0, 255).round().numpy(), atol=1.01)


@pytest.mark.parametrize(("width", "height"), [(60, 45), (45, 60), (61, 40), (20, 33), (400, 40), (40, 400), (3, 900)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_resize_matches_pillow_for_any_shape(tmp_path: Path, width: int, height: int, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze())
    image.save(tmp_path / "noise.png")
    ours = read_image(tmp_path / "noise.png", (24, 32), channels)
    scale = max(24 / height, 32 / width)
    whole = np.array(image.resize((max(round(width * scale), 32), max(round(height * scale), 24)), 3))
    upper, left = ((side - least + 1) // 2 for side, least in zip(whole.shape, (24, 32), strict=False))
    theirs = whole.reshape(*whole.shape[:2], channels)[upper : upper + 24, left : left + 32].astype(int)
    difference = np.abs(ours - theirs)
    assert ours.shape == (24, 32, channels)
    if channels < 4 and max(width / height, height / width) < 4:
        assert difference.max() <= 1
    else:  # resizing crops at subpixel positions
        assert difference.mean() < 40, "mean difference of noise images; unrelated ones differ by 85"


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGBA", 3), ("P", 3), ("CMYK", 3), ("RGB", 1), ("RGB", 4)])
def test_every_mode_is_converted_to_the_requested_channels(tmp_path: Path, mode: str, channels: int) -> None:
    path = write_image(tmp_path / ("image.jpg" if mode == "CMYK" else "image.png"), mode=mode)
    assert read_image(path, (24, 32), channels).shape == (24, 32, channels)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise: the left edge becomes the top
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = read_image(tmp_path / "turned.png", (40, 20))
    assert upright[:15].min() == 255
    assert upright[25:].max() == 0


def test_augmentation_depends_only_on_the_draw(folder: Path) -> None:
    training, _ = open_datasets(DataConfig(path=str(folder), size=16, flip=True, crop="random"))
    plain = training[0].image
    draws = {number: training[0, number].image for number in range(8)}
    for number, image in draws.items():
        assert torch.equal(training[0, number].image, image)
    assert len({image.numpy().tobytes() for image in draws.values()}) > 4
    mirrored, _ = open_datasets(DataConfig(path=str(folder), size=16, flip=True))
    assert torch.equal(mirrored[0, 1].image, plain.flip(2))
    assert torch.equal(mirrored[0, 2].image, plain)


def test_uint8_float_round_trip_is_exact() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = to_float(values)
    assert (floats.min(), floats.max(), floats.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_uint8(floats), values)
    assert to_uint8(torch.tensor([-3.0, 3.0]).view(1, 1, 2)).flatten().tolist() == [0, 255]


def test_scenes_support_any_size_and_channels_and_have_classes() -> None:
    config = DataConfig(size=(16, 24), channels=1, labels="folder", num_scenes=50, val_fraction=0.2)
    training, validation = open_datasets(config)
    assert len(training) + len(validation) == 50
    assert training[0].image.shape == (1, 16, 24)
    assert training.classes[training[3].label] == training.names[3].split("/")[0]


def test_unusable_folder_errors_name_the_folder(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    single = tmp_path / "single"
    write_image(single / "one.png")
    write_image(folder / "loose.png")
    for path, labels, message in (
        (tmp_path / "missing", "none", "no such folder: .*missing. Give a folder"),
        (folder / "notes.md", "none", r"not a folder or archive: .*notes\.md. Give a folder"),
        (empty, "none", "no images in .*empty"),
        (single, "none", "only one image"),
        (folder, "folder", r"loose\.png is not in a class folder"),
    ):
        with pytest.raises(UserError, match=message):
            open_datasets(DataConfig(path=str(path), size=16, labels=labels))  # pyright: ignore[reportArgumentType]


def test_unreadable_file_errors_name_the_file(tmp_path: Path) -> None:
    whole = write_image(tmp_path / "whole.jpg", 200, 200).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "nothing.png").write_bytes(b"")
    for name in ("cut.jpg", "text.png", "nothing.png"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read as an image .*\. Remove or replace it") as error:
            read_image(tmp_path / name, (16, 16))
        assert "\n" not in str(error.value)


def test_real_photographs_are_read(photographs: Path) -> None:
    training, validation = open_datasets(DataConfig(path=str(photographs / "kodak"), size=(64, 96), val_fraction=0.2))
    assert len(training) + len(validation) == 24
    assert training[0].image.float().std() > 10

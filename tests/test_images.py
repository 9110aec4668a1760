"""Images: the split, labels, the one transform, and files that are no images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqvae2.data.images import DataConfig, open_datasets, read_image, to_float, to_uint8
from vqvae2.errors import UserError


def picture(path: Path, width: int = 40, height: int = 30, mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    Image.fromarray(pixels).convert("RGB").convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number in range(60):
        picture(root / ("cat", "dog", "eel")[number % 3] / "deep" / f"{number}.png", seed=number)
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden.png").write_text("nor this")
    return root


def test_a_file_stays_on_its_side_when_files_are_added(folder: Path) -> None:
    config = DataConfig(path=str(folder), size=16, val_fraction=0.3)
    training, held_out = open_datasets(config)
    assert len(training) + len(held_out) == 60
    assert 5 < len(held_out) < 35
    before = set(held_out.names)
    for number in range(60, 90):
        picture(folder / "fox" / f"{number}.png", seed=number)
    _, later = open_datasets(config)
    assert before == {name for name in later.names if not name.startswith("fox")}


def test_every_side_has_an_image_even_in_the_smallest_folder(tmp_path: Path) -> None:
    for number in range(2):
        picture(tmp_path / f"{number}.png", seed=number)
    training, held_out = open_datasets(DataConfig(path=str(tmp_path), size=16, val_fraction=0.001))
    assert (len(training), len(held_out)) == (1, 1)


def test_labels_are_the_first_folder_of_a_path(folder: Path) -> None:
    training, _ = open_datasets(DataConfig(path=str(folder), size=16, labels="folder"))
    assert training.classes == ("cat", "dog", "eel")
    for index, name in enumerate(training.names):
        assert training.classes[training[index].label] == name.split("/")[0]
    unlabelled, _ = open_datasets(DataConfig(path=str(folder), size=16))
    assert unlabelled.classes == ()
    assert unlabelled[0].label == -1


def test_resizing_covers_the_size_and_crops_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :20], pixels[:, 20:60], pixels[:, 60:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "bands.png")
    middle = read_image(tmp_path / "bands.png", (20, 20))
    assert (middle[:, 2:-2] == (0, 255, 0)).all()
    left = read_image(tmp_path / "bands.png", (20, 20), crop_position=(0.0, 0.0))
    assert (left[:, :8] == (255, 0, 0)).all()


def test_resizing_is_antialiased_and_agrees_with_torchvision(tmp_path: Path) -> None:
    path = picture(tmp_path / "noise.png", 64, 64)
    ours = read_image(path, (16, 16)).astype(float)
    tensor = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float()
    theirs = torch.nn.functional.interpolate(tensor, size=16, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    np.testing.assert_allclose(ours, theirs.clamp(0, 255).round().numpy(), atol=1.01)


@pytest.mark.parametrize(("width", "height"), [(60, 45), (45, 60), (61, 40), (20, 33), (400, 40), (40, 400), (3, 900)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_resizing_agrees_with_pillow_whatever_the_shape(tmp_path: Path, width: int, height: int, channels: int) -> None:
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
    else:  # cropped between pixels while it is resized
        assert difference.mean() < 40, "of noise; 85 where nothing fits"


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGBA", 3), ("P", 3), ("CMYK", 3), ("RGB", 1), ("RGB", 4)])
def test_every_mode_becomes_the_channels_asked_for(tmp_path: Path, mode: str, channels: int) -> None:
    path = picture(tmp_path / ("image.jpg" if mode == "CMYK" else "image.png"), mode=mode)
    assert read_image(path, (24, 32), channels).shape == (24, 32, channels)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right: what is left becomes the top
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = read_image(tmp_path / "turned.png", (40, 20))
    assert upright[:15].min() == 255
    assert upright[25:].max() == 0


def test_augmentation_depends_on_the_draw_alone(folder: Path) -> None:
    training, _ = open_datasets(DataConfig(path=str(folder), size=16, flip=True, crop="random"))
    plain = training[0].image
    draws = {number: training[0, number].image for number in range(8)}
    for number, image in draws.items():
        assert torch.equal(training[0, number].image, image)
    assert len({image.numpy().tobytes() for image in draws.values()}) > 4
    mirrored, _ = open_datasets(DataConfig(path=str(folder), size=16, flip=True))
    assert torch.equal(mirrored[0, 1].image, plain.flip(2))
    assert torch.equal(mirrored[0, 2].image, plain)


def test_floats_are_between_minus_one_and_one_and_come_back_as_the_same_bytes() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floats = to_float(values)
    assert (floats.min(), floats.max(), floats.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_uint8(floats), values)
    assert to_uint8(torch.tensor([-3.0, 3.0]).view(1, 1, 2)).flatten().tolist() == [0, 255]


def test_scenes_come_in_any_size_and_channels_with_their_classes() -> None:
    config = DataConfig(size=(16, 24), channels=1, labels="folder", num_scenes=50, val_fraction=0.2)
    training, held_out = open_datasets(config)
    assert len(training) + len(held_out) == 50
    assert training[0].image.shape == (1, 16, 24)
    assert training.classes[training[3].label] == training.names[3].split("/")[0]


def test_folders_that_cannot_be_used_are_named(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    single = tmp_path / "single"
    picture(single / "one.png")
    picture(folder / "loose.png")
    for path, labels, message in (
        (tmp_path / "missing", "none", "no such folder: .*missing. Give a folder"),
        (folder / "notes.txt", "none", r"not a folder or archive: .*notes\.txt. Give a folder"),
        (empty, "none", "no images in .*empty"),
        (single, "none", "only one image"),
        (folder, "folder", r"loose\.png is not in a class folder"),
    ):
        with pytest.raises(UserError, match=message):
            open_datasets(DataConfig(path=str(path), size=16, labels=labels))  # pyright: ignore[reportArgumentType]


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    whole = picture(tmp_path / "whole.jpg", 200, 200).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("this is a text")
    (tmp_path / "nothing.png").write_bytes(b"")
    for name in ("cut.jpg", "text.png", "nothing.png"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read as an image .*\. Remove or replace it") as error:
            read_image(tmp_path / name, (16, 16))
        assert "\n" not in str(error.value)


def test_real_photographs_are_read(photographs: Path) -> None:
    training, held_out = open_datasets(DataConfig(path=str(photographs / "kodak"), size=(64, 96), val_fraction=0.2))
    assert len(training) + len(held_out) == 24
    assert training[0].image.float().std() > 10

"""Test unreadable images: replaced, reported once, counted, and an error if there are too many."""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqvae2.data.images import DataConfig, ImageDataset
from vqvae2.data.samplers import ResumableBatchSampler, SequentialBatchSampler, load_batches
from vqvae2.data.splits import open_datasets
from vqvae2.errors import UserError

BAD = (4, 5, 17)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write 40 image files with one gray level each, three of which are not images."""
    for number in range(40):
        path = tmp_path / "images" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        if number in BAD:
            path.write_text("not an image")
        else:
            Image.fromarray(np.full((8, 8), number, np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def log_to_stderr() -> Iterator[None]:
    """Send warnings to stderr, as outside of pytest, which installs its own handler."""
    logger, handler = logging.getLogger("vqvae2"), logging.lastResort
    assert handler is not None
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def open_dataset(folder: Path, **settings: object) -> ImageDataset:
    config = {
        "path": str(folder),
        "size": 8,
        "channels": 1,
        "val_fraction": 1e-9,
        "max_unreadable_fraction": 0.1,
        **settings,
    }
    return open_datasets(DataConfig.from_dict(config, "test"))[0]


def gray_levels(batches: Iterator[object]) -> list[list[int]]:
    return [batch.image[:, 0, 0, 0].tolist() for batch in batches]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.usefixtures("log_to_stderr")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_replaced_by_the_next_and_reported_once(
    folder: Path, num_workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    images = open_dataset(folder)
    expected = {int(name[:2]): int(name[:2]) for name in images.names}
    for number, replacement in ((4, 6), (5, 6), (17, 18)):
        assert replacement in expected
        expected[number] = replacement
    for _ in range(2):
        batches = load_batches(images, SequentialBatchSampler(len(images), 7), num_workers)
        assert list(itertools.chain(*gray_levels(batches))) == list(expected.values())
    batches = load_batches(open_dataset(folder), SequentialBatchSampler(len(images), 7), 0)
    assert list(itertools.chain(*gray_levels(batches))) == list(expected.values())
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 3
    for number in BAD:
        assert sum(f"{number:02d}.png: cannot be read as an image" in line for line in warnings) == 1


def test_batches_depend_only_on_seed_and_step(folder: Path) -> None:
    def batches(start: int, num_workers: int = 0) -> list[list[int]]:
        images = open_dataset(folder, crop="random", flip=True)
        return gray_levels(
            load_batches(images, ResumableBatchSampler(len(images), 8, start=start, stop=12, seed=1), num_workers)
        )

    expected = batches(0)
    assert expected == batches(0, num_workers=2)
    for start in (1, 4, 7):  # resumed before and after the unreadable images
        assert batches(start) == expected[start:]
    assert not {*BAD} & set(itertools.chain(*expected))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_unreadable_images_give_one_error_that_lists_them(folder: Path, num_workers: int) -> None:
    images = open_dataset(folder, max_unreadable_fraction=0.06)
    with pytest.raises(UserError) as error:
        list(load_batches(images, SequentialBatchSampler(len(images), 7), num_workers))
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(
        "data.path: 3 of 39 images cannot be read as images, more than data.max_unreadable_fraction = 0.06"
    )
    assert [text.count(f"/{number:02d}.png") for number in BAD] == [1, 1, 1]
    assert text.endswith("(unknown image format). Remove or replace them.")


def test_error_lists_at_most_twenty_images(folder: Path) -> None:
    images = open_dataset(folder)
    with pytest.raises(UserError, match=r"20\.png and 10 more. Remove") as error:
        images.check_unreadable_fraction(list(range(20)) + list(range(29, 39)))
    assert str(error.value).count(".png") == 20


def test_repaired_image_is_read_after_reopening_the_folder(folder: Path) -> None:
    index = list(open_dataset(folder).names).index("17.png")
    assert open_dataset(folder).read(index) is None
    assert open_dataset(folder)[index].image.unique().tolist() == [18]
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(folder / "17.png")
    assert open_dataset(folder)[index].image.unique().tolist() == [77]

"""Unreadable images: skipped, named once, counted, and an error where there are too many."""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqvae2.data.images import DataConfig, ImageDataset, open_datasets
from vqvae2.data.samplers import ResumableBatchSampler, SequentialBatchSampler, load_batches
from vqvae2.errors import UserError

BAD = (4, 5, 17)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of one grey each; three are none."""
    for number in range(40):
        path = tmp_path / "images" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        if number in BAD:
            path.write_text("no image")
        else:
            Image.fromarray(np.full((8, 8), number, np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def on_stderr() -> Iterator[None]:
    """Warnings go where they go outside of pytest, which has a handler of its own."""
    logger, handler = logging.getLogger("vqvae2"), logging.lastResort
    assert handler is not None
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def opened(folder: Path, **settings: object) -> ImageDataset:
    config = {
        "path": str(folder),
        "size": 8,
        "channels": 1,
        "val_fraction": 1e-9,
        "max_unreadable_fraction": 0.1,
        **settings,
    }
    return open_datasets(DataConfig.from_dict(config, "test"))[0]


def greys(batches: Iterator[object]) -> list[list[int]]:
    return [batch.image[:, 0, 0, 0].tolist() for batch in batches]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.usefixtures("on_stderr")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_next_readable_image_stands_in_and_each_is_named_once(
    folder: Path, num_workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    images = opened(folder)
    expected = {int(name[:2]): int(name[:2]) for name in images.names}
    for number, instead in ((4, 6), (5, 6), (17, 18)):
        assert instead in expected
        expected[number] = instead
    for _ in range(2):
        seen = list(itertools.chain(*greys(load_batches(images, SequentialBatchSampler(len(images), 7), num_workers))))
        assert seen == list(expected.values())
    assert (
        list(itertools.chain(*greys(load_batches(opened(folder), SequentialBatchSampler(len(images), 7), 0)))) == seen
    )
    warned = capfd.readouterr().err.splitlines()
    assert len(warned) == 3
    for number in BAD:
        assert sum(f"{number:02d}.png: cannot be read as an image" in line for line in warned) == 1


def test_the_order_of_training_depends_on_seed_and_step_alone(folder: Path) -> None:
    def batches(start: int, num_workers: int = 0) -> list[list[int]]:
        images = opened(folder, crop="random", flip=True)
        return greys(
            load_batches(images, ResumableBatchSampler(len(images), 8, start=start, stop=12, seed=1), num_workers)
        )

    whole = batches(0)
    assert whole == batches(0, num_workers=2)
    for start in (1, 4, 7):  # resumed before and after the bad ones were met
        assert batches(start) == whole[start:]
    assert not {*BAD} & set(itertools.chain(*whole))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_are_one_error_that_lists_them(folder: Path, num_workers: int) -> None:
    images = opened(folder, max_unreadable_fraction=0.06)
    with pytest.raises(UserError) as error:
        list(load_batches(images, SequentialBatchSampler(len(images), 7), num_workers))
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(
        "data.path: 3 of 39 images cannot be read as images, more than data.max_unreadable_fraction = 0.06"
    )
    assert [text.count(f"/{number:02d}.png") for number in BAD] == [1, 1, 1]
    assert text.endswith("(unknown image format). Remove or replace them.")


def test_an_error_lists_the_first_twenty(folder: Path) -> None:
    images = opened(folder)
    with pytest.raises(UserError, match=r"20\.png and 10 more. Remove") as error:
        images.check_unreadable_fraction(list(range(20)) + list(range(29, 39)))
    assert str(error.value).count(".png") == 20


def test_a_repaired_image_is_read_by_the_next_one_that_opens_the_folder(folder: Path) -> None:
    index = list(opened(folder).names).index("17.png")
    assert opened(folder).read(index) is None
    assert opened(folder)[index].image.unique().tolist() == [18]
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(folder / "17.png")
    assert opened(folder)[index].image.unique().tolist() == [77]

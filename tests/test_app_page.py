"""The page of `vqvae2 app`, served by the command, and used in a browser as a person would."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from sampling.app.pictures import encode, reconstruct
from sampling.pipeline import VQVAE2Pipeline
from tests.app_browser import fill, message, panel, picture, pixels, press, tiles, upload
from vqvae2.data.images import to_uint8
from vqvae2.pictures import hwc_to_chw, to_pil

if TYPE_CHECKING:
    from playwright.sync_api import Page

    OpenPage = Callable[[str], Page]


@pytest.fixture(scope="module")
def pipeline() -> VQVAE2Pipeline:
    return VQVAE2Pipeline.from_pretrained("scenes64")


@pytest.fixture(scope="module")
def photo(pipeline: VQVAE2Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a PNG of the model's size."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    to_pil(to_uint8(pipeline(num_images=1, seed=11))[0]).save(path)
    return path


def read(path: Path) -> torch.Tensor:
    return hwc_to_chw(np.array(Image.open(path)))


def test_sample(open_page: "OpenPage", pipeline: VQVAE2Pipeline) -> None:
    page = open_page("Sample")
    fill(page, "number input for Images", 4)
    classes = panel(page).get_by_label(re.compile("^Classes")).first
    for name in ("sea", "night"):
        classes.fill(name)
        page.get_by_role("option", name=name).click()
    fill(page, "Seed", 5)
    fill(page, "number input for Temperature, bottom", 1)
    press(page, "Sample")
    grid = pixels(page, "Samples")
    assert grid.shape == (2 * 130 + 2, 2 * 130 + 2, 3)
    expected = pipeline(num_images=4, seed=5, class_labels=(1, 5), temperature={"top": 0.9, "bottom": 1.0})
    difference = tiles(grid, 2, 4) - to_uint8(expected).permute(0, 2, 3, 1).numpy().astype(float)
    assert np.abs(difference).mean() < 0.5  # equal up to rounding
    assert grid.std() > 20


def test_inpaint(open_page: "OpenPage", pipeline: VQVAE2Pipeline, photo: Path) -> None:
    page = open_page("Inpaint")
    press(page, "Redraw")
    assert message(page) == "image: none yet. Upload an image, or sample one."
    upload(page, photo)
    canvas = panel(page).locator("canvas").first
    text = ""
    while text != "mask: nothing is painted. Paint the part of the image to redraw.":
        press(page, "Redraw")
        text = message(page)
        assert text.startswith(("image: none yet", "mask: nothing is painted"))  # before and after the upload
    page.wait_for_timeout(1000)  # until the editor shows the image, which nothing indicates
    box = canvas.bounding_box()
    assert box is not None
    center, side = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2), 384
    page.mouse.move(center[0] - 0.3 * side, center[1] - 0.3 * side)
    page.mouse.down()
    page.mouse.move(center[0], center[1] - 0.3 * side, steps=3)
    page.mouse.up()
    page.wait_for_timeout(500)
    fill(page, "number input for Variants", 3)
    press(page, "Redraw")
    variants = tiles(pixels(page, "Variants"), 2, 3).astype(int)
    reconstruction = reconstruct(pipeline, read(photo))[-1].permute(1, 2, 0).numpy().astype(int)
    difference = np.abs(variants - reconstruction)
    assert difference[:, 48:].max() <= 1  # far from what was painted
    assert difference[:, 11:16, 16:30].mean() > 3
    assert len({variant.tobytes() for variant in variants}) == 3


def test_variations(open_page: "OpenPage") -> None:
    page = open_page("Variations")
    press(page, "Sample an image")
    image = pixels(page, "Image")
    assert image.shape == (384, 384, 3)
    fill(page, "number input for Variants", 2)
    press(page, "Sample variations")
    first, second = tiles(pixels(page, "Variations"), 2, 2).astype(int)
    assert np.abs(first - second).mean() > 1
    assert np.abs(first - image[::6, ::6]).mean() < 60  # the top level keeps the layout
    assert first.std() > 10


def test_levels(open_page: "OpenPage", pipeline: VQVAE2Pipeline, photo: Path) -> None:
    page = open_page("Levels")
    upload(page, photo)
    top, both = reconstruct(pipeline, read(photo)).permute(0, 2, 3, 1).numpy().astype(int)
    shown = pixels(page, "Reconstruction from top + bottom")
    assert np.abs(shown[::6, ::6] - both).max() <= 1
    before = picture(page, "Reconstruction").get_attribute("src")
    panel(page).get_by_role("slider").first.press("ArrowLeft")
    shown = pixels(page, "Reconstruction", before)
    assert np.abs(shown[::6, ::6] - top).max() <= 1
    panel(page).get_by_text("Reconstruction from top", exact=True).wait_for()


def test_codes(open_page: "OpenPage", pipeline: VQVAE2Pipeline, photo: Path) -> None:
    page = open_page("Codes")
    upload(page, photo)
    bottom = encode(pipeline, read(photo)[None])[0][0].numpy()
    colored = pixels(page, "Codes, bottom level")[::24, ::24]
    assert len({color.tobytes() for color in colored.reshape(-1, 3)}) == len(np.unique(bottom))
    clicked = picture(page, "Codes, bottom level")
    box = clicked.bounding_box()
    assert box is not None
    before = picture(page, "Image").nth(0).get_attribute("src")
    clicked.click(position={"x": box["width"] * 4.5 / 16, "y": box["height"] * 10.5 / 16})
    code = bottom[10, 4]
    uses = int((bottom == code).sum())
    panel(page).get_by_text(f"Code {code} of 1024, bottom level: {uses} times in 1 of 1 images.").wait_for()
    patches = pixels(page, "Patches")
    assert patches.shape[1] == min(uses, 8) * 98 + 2
    press(page, "Sample 16 images")
    panel(page).locator(".grid-container img").nth(15).wait_for()
    assert before is not None

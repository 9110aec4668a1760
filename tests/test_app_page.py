"""The page of `vqvae2 app`, served by the command and used in a browser as a person would, and by many requests."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="needs gradio: pip install 'vqvae2[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")

from playwright.sync_api import Browser, Locator, Page  # noqa: E402

from sampling.app.pictures import encode, reconstruct  # noqa: E402
from sampling.pipeline import VQVAE2Pipeline  # noqa: E402
from vqvae2.data.images import to_uint8  # noqa: E402
from vqvae2.pictures import hwc_to_chw, to_pil  # noqa: E402

TIMEOUT_MS = 20_000


class Server(NamedTuple):
    """A running `vqvae2 app scenes64`."""

    url: str
    process: subprocess.Popen[str]
    folder: Path  # working directory
    temporary: Path  # where temporary folders are created


def start_server(folder: Path) -> Server:
    """Start the command in an empty folder, with a proxy that does not exist, and wait until it prints its address."""
    working, temporary = folder / "working", folder / "temporary"
    working.mkdir()
    temporary.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nowhere = "http://127.0.0.1:9"
    environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    environment |= {"HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "http_proxy": nowhere, "https_proxy": nowhere}
    process = subprocess.Popen(
        [sys.executable, "-m", "vqvae2", "app", "scenes64", "--port", str(port)],
        cwd=working,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url == f"http://127.0.0.1:{port}/", url + process.stdout.read()
    assert process.stdout.readline() == "Press Ctrl-C to stop.\n"
    return Server(url, process, working, temporary)


def stop_server(server: Server, number: signal.Signals) -> str:
    """Send a signal, check the exit status and that no file is left, and return what was printed."""
    server.process.send_signal(number)
    printed, _ = server.process.communicate(timeout=20)
    assert server.process.returncode == 128 + number
    assert list(server.folder.iterdir()) == []
    assert list(server.temporary.iterdir()) == []
    return printed


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("app"))
    yield server
    printed = stop_server(server, signal.SIGINT)
    assert printed == "vqvae2: stopped by SIGINT\n"  # no traceback, and no warning


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(server: Server, browser: Browser) -> Iterator[Callable[[str], Page]]:
    """Return a function that opens a tab of the page. Afterwards, check that no other host was contacted."""
    pages: list[Page] = []
    requested: list[str] = []

    def open_tab(name: str) -> Page:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        pages.append(page)
        page.set_default_timeout(TIMEOUT_MS)
        page.on("request", lambda request: requested.append(request.url))
        page.goto(server.url)
        page.get_by_role("tab", name=name).click()
        return page

    yield open_tab
    for page in pages:
        page.close()
    addresses = [urlparse(url) for url in requested]
    assert {address.hostname for address in addresses if address.scheme not in ("data", "blob")} == {"127.0.0.1"}


@pytest.fixture(scope="module")
def pipeline() -> VQVAE2Pipeline:
    return VQVAE2Pipeline.from_pretrained("scenes64")


@pytest.fixture(scope="module")
def photo(pipeline: VQVAE2Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a PNG of the model's size."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    to_pil(to_uint8(pipeline(num_images=1, seed=11))[0]).save(path)
    return path


def panel(page: Page) -> Locator:
    """Return the tab that is shown."""
    return page.locator("[role=tabpanel]").locator("visible=true").first


def picture(page: Page, label: str) -> Locator:
    """Return the picture with a label."""
    return panel(page).locator(f'.block:has(label[data-testid="block-label"]:has-text("{label}")) img').first


def pixels(page: Page, label: str, before: str | None = None) -> np.ndarray:
    """Wait for a picture, other than the one with the source `before`, and return its pixels."""
    shown = picture(page, label)
    shown.wait_for()
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while shown.get_attribute("src") == before:
        assert time.monotonic() < deadline, f"{label}: the picture has not changed"
        page.wait_for_timeout(50)
    content = page.request.get(str(shown.get_attribute("src"))).body()
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def press(page: Page, button: str) -> None:
    panel(page).get_by_role("button", name=button, exact=True).click()


def upload(page: Page, path: Path) -> None:
    panel(page).locator("input[type=file]").first.set_input_files(path)


def fill(page: Page, label: str, value: int) -> None:
    """Type into a number field, and leave it."""
    field = panel(page).get_by_label(label).first
    field.fill(str(value))
    field.press("Tab")


def message(page: Page) -> str:
    """Return the message in the page, and close it."""
    toast = page.locator(".toast-body").first
    toast.wait_for()
    text = toast.inner_text().splitlines()[-1]  # after a heading and a cross
    toast.locator(".toast-close").click()
    toast.wait_for(state="detached")
    return text


def tiles(grid: np.ndarray, columns: int, count: int) -> np.ndarray:
    """Return the images (N, 64, 64, 3) of a grid, at the size of the model."""
    step = (grid.shape[1] - 2) // columns
    factor = (step - 2) // 64
    places = [divmod(number, columns) for number in range(count)]
    corners = [(2 + row * step, 2 + column * step) for row, column in places]
    return np.stack([grid[top : top + step - 2, left : left + step - 2][::factor, ::factor] for top, left in corners])


def read(path: Path) -> torch.Tensor:
    return hwc_to_chw(np.array(Image.open(path)))


def test_sample(open_page: Callable[[str], Page], pipeline: VQVAE2Pipeline) -> None:
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
    expected = pipeline(num_images=4, seed=5, class_labels=(1, 5), temperature={"top": 0.95, "bottom": 1.0})
    difference = tiles(grid, 2, 4) - to_uint8(expected).permute(0, 2, 3, 1).numpy().astype(float)
    assert np.abs(difference).mean() < 0.5  # equal up to rounding
    assert grid.std() > 20


def test_inpaint(open_page: Callable[[str], Page], pipeline: VQVAE2Pipeline, photo: Path) -> None:
    page = open_page("Inpaint")
    press(page, "Redraw")
    assert message(page) == "image: none yet. Upload an image, or sample one."
    upload(page, photo)
    canvas = panel(page).locator("canvas").first
    page.wait_for_timeout(1500)  # the editor has no sign that it has loaded the image
    press(page, "Redraw")
    assert message(page) == "mask: nothing is painted. Paint the part of the image to redraw."
    box = canvas.bounding_box()
    assert box is not None
    center, side = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2), 384
    page.mouse.move(center[0] - 0.3 * side, center[1] - 0.3 * side)
    page.mouse.down()
    page.mouse.move(center[0], center[1] - 0.3 * side, steps=20)
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


def test_variations(open_page: Callable[[str], Page]) -> None:
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


def test_levels(open_page: Callable[[str], Page], pipeline: VQVAE2Pipeline, photo: Path) -> None:
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


def test_codes(open_page: Callable[[str], Page], pipeline: VQVAE2Pipeline, photo: Path) -> None:
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
    panel(page).get_by_text(f"Code {code} of 128, bottom level: {uses} times in 1 of 1 images.").wait_for()
    patches = pixels(page, "Patches")
    assert patches.shape[1] == min(uses, 8) * 98 + 2
    press(page, "Sample 16 images")
    panel(page).locator(".grid-container img").nth(15).wait_for()
    assert before is not None

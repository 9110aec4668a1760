"""Serve the page of `vqvae2 app` with the command, and use it in a browser."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlparse

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

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
    left = [path.name for path in server.temporary.iterdir()]
    assert [name for name in left if not name.startswith("torchinductor")] == []  # torch's cache, of any command
    return printed


def open_pages(server: Server, browser: "Browser") -> Iterator[Callable[[str], "Page"]]:
    """Yield a function that opens a tab of the page. Afterwards, check that no other host was contacted."""
    pages = []
    requested: list[str] = []

    def open_tab(name: str) -> "Page":
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


def panel(page: "Page") -> "Locator":
    """Return the tab that is shown."""
    return page.locator("[role=tabpanel]").locator("visible=true").first


def picture(page: "Page", label: str) -> "Locator":
    """Return the picture with a label."""
    return panel(page).locator(f'.block:has(label[data-testid="block-label"]:has-text("{label}")) img').first


def pixels(page: "Page", label: str, before: str | None = None) -> np.ndarray:
    """Wait for a picture, other than the one with the source `before`, and return its pixels."""
    shown = picture(page, label)
    shown.wait_for()
    deadline = time.monotonic() + TIMEOUT_MS / 1000
    while shown.get_attribute("src") == before:
        assert time.monotonic() < deadline, f"{label}: the picture has not changed"
        page.wait_for_timeout(50)
    content = page.request.get(str(shown.get_attribute("src"))).body()
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def press(page: "Page", button: str) -> None:
    panel(page).get_by_role("button", name=button, exact=True).click()


def upload(page: "Page", path: Path) -> None:
    panel(page).locator("input[type=file]").first.set_input_files(path)


def fill(page: "Page", label: str, value: int) -> None:
    """Type into a number field, and leave it."""
    field = panel(page).get_by_label(label).first
    field.fill(str(value))
    field.press("Tab")


def message(page: "Page") -> str:
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

"""What the page of `vqvae2 app` survives: bad uploads, canceled jobs, closed tabs, two users, signals, long use."""

import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from tests.app_browser import fill, message, panel, picture, pixels, press, start_server, stop_server, upload
from vqvae2.data.image_io import read_image

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.app_browser import Server

    OpenPage = Callable[[str], Page]


def noise(path: Path, height: int, width: int) -> Path:
    """Write a PNG of random pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compress_level=1)
    return path


def test_bad_uploads_give_one_line_messages(open_page: "OpenPage", tmp_path: Path) -> None:
    page = open_page("Levels")
    (tmp_path / "note.txt").write_text("not an image")
    (tmp_path / "note.png").write_text("not an image")
    content = noise(tmp_path / "good.png", 300, 200).read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    Image.new("L", (11000, 9000)).save(tmp_path / "huge.png")
    for name, expected in {
        "note.txt": "Invalid file type: note.txt. Only image allowed.",
        "note.png": "note.png: cannot be read as an image (unknown image format). Remove or replace it.",
        "cut.png": "cut.png: cannot be read as an image (image file is truncated). Remove or replace it.",
        "huge.png": "huge.png: cannot be read as an image (more than data.max_pixels = 89,478,485 pixels",
    }.items():
        upload(page, tmp_path / name)
        assert message(page).startswith(expected)
    upload(page, tmp_path / "good.png")
    assert pixels(page, "Image").shape == (384, 384, 3)


@pytest.mark.slow
def test_upload_of_40_megapixels(open_page: "OpenPage", tmp_path: Path) -> None:
    path = noise(tmp_path / "large.png", 5000, 8000)
    page = open_page("Levels")
    upload(page, path)
    expected = read_image(path, (64, 64))
    assert np.array_equal(pixels(page, "Image")[::6, ::6], expected)


def test_upload_of_a_closed_tab_prints_nothing(app_server: "Server") -> None:
    """The fixture checks what the server has printed."""
    address = urlparse(app_server.url)
    head = (
        "POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n"
        "Content-Type: multipart/form-data; boundary=edge\r\n\r\n"
        '--edge\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    )
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(head.encode() + bytes(1000))
        time.sleep(0.5)  # until the server reads the file
    with urlopen(app_server.url, timeout=20) as response:
        assert response.status == 200


def submit_long_job(page: "Page", seed: int) -> None:
    """Press the button that samples many images, twice as slowly because of guidance."""
    fill(page, "number input for Images", 64)
    for level in ("top", "bottom"):
        fill(page, f"number input for Guidance scale, {level}", 2)
    fill(page, "Seed", seed)
    press(page, "Sample")


def start_long_job(page: "Page", seed: int) -> None:
    """Start sampling and wait for its first progress."""
    submit_long_job(page, seed)
    panel(page).get_by_text("codes").first.wait_for()


def test_cancel_stops_sampling_and_keeps_the_previous_picture(open_page: "OpenPage") -> None:
    page = open_page("Sample")
    fill(page, "number input for Images", 1)
    press(page, "Sample")
    before = pixels(page, "Samples")
    start_long_job(page, 1)
    press(page, "Cancel")
    assert message(page) == "Canceled."
    page.wait_for_timeout(5000)  # the job would be complete by now
    assert np.array_equal(pixels(page, "Samples"), before)


def test_job_of_a_closed_tab_stops(open_page: "OpenPage") -> None:
    pages = [open_page("Sample") for _ in range(5)]
    started = time.monotonic()
    start_long_job(pages[0], 1)
    pixels(pages[0], "Samples")
    duration = time.monotonic() - started  # of one long job
    for seed, page in enumerate(pages[1:]):  # they wait for each other
        submit_long_job(page, seed + 2)
    for page in pages[1:]:
        page.close()
    started = time.monotonic()
    fill(pages[0], "number input for Images", 1)
    before = picture(pages[0], "Samples").get_attribute("src")
    press(pages[0], "Sample")
    pixels(pages[0], "Samples", before)
    assert time.monotonic() - started < 2 * duration  # less than the four jobs


def test_two_users_at_once_get_their_own_pictures(open_page: "OpenPage") -> None:
    pages = [open_page("Sample"), open_page("Sample")]
    for seed, page in enumerate(pages):
        fill(page, "number input for Images", 9)
        fill(page, "Seed", 20 + seed)
    for page in pages:
        press(page, "Sample")
    first, second = (pixels(page, "Samples") for page in pages)
    assert first.shape == second.shape
    assert not np.array_equal(first, second)
    fill(pages[0], "Seed", 21)
    press(pages[0], "Sample")
    before = picture(pages[0], "Samples").get_attribute("src")
    assert np.array_equal(pixels(pages[0], "Samples", before), second)


@pytest.mark.slow
def test_sigterm_stops_a_busy_server(browser: Any, tmp_path: Path) -> None:
    server = start_server(tmp_path)
    page = browser.new_page()
    page.goto(server.url)
    start_long_job(page, 0)
    started = time.monotonic()
    assert stop_server(server, signal.SIGTERM) == "vqvae2: stopped by SIGTERM\n"
    assert time.monotonic() - started < 10
    page.close()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the memory of a process from /proc")
def test_200_requests_leave_memory_bounded(app_server: "Server", tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    small, large = noise(tmp_path / "small.png", 300, 200), noise(tmp_path / "large.png", 5000, 8000)
    client = Client(app_server.url, verbose=False, analytics_enabled=False, download_files=str(tmp_path / "downloads"))

    levels = (0.95, 1, 1, 0.85, 1, 1)  # temperature, top-p and guidance scale of each level

    def request(number: int) -> None:
        kind = number % 5
        if kind == 0:
            assert Path(client.predict(number % 60 + 1, [], number, *levels, api_name="/sample")).stat().st_size > 1000
        elif kind == 1:
            client.predict(handle_file(str(large if number % 50 == 1 else small)), api_name="/upload_levels")
        elif kind == 2:
            client.predict(number % 10, api_name="/sample_variations")
        elif kind == 3:
            client.predict(number % 10, 1, 4, number, *levels, api_name="/variations")
        else:
            client.predict(api_name="/sample_codes")

    for number in range(10):
        request(number)
    before = resident_mib(app_server.process.pid)
    for number in range(200):
        request(number)
    growth = resident_mib(app_server.process.pid) - before
    print(f"memory before: {before:.0f} MiB, growth over 200 requests: {growth:.0f} MiB")
    assert growth < 200


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024

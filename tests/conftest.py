"""Shared fixtures: one thread, photographs, tones, a small file system, Inception weights, a tiny run, a page."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

from vqvae2.__main__ import main

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from tests.app_browser import Server

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data"

# Runs every stage in seconds: two levels on small scenes. Tests check files and errors, not the quality of the results.
TINY = """
data: {size: 32, labels: folder, val_fraction: 0.1, num_scenes: 200, num_workers: 0}
autoencoder:
  model:
    channels: 16
    residual_channels: 8
    residual_layers: 1
    levels:
      - {stride: 4, quantizer: {kind: ema, codebook_size: 16, code_dim: 8}}
      - {stride: 2, quantizer: {kind: gradient, codebook_size: 12, code_dim: 8}}
  training: {steps: 6, batch_size: 8, log_every: 2, validate_every: 3, preview_every: 3, checkpoint_every: 2}
priors:
  top:
    model: {kind: pixelsnail, channels: 8, residual_channels: 8, kernel: 3, blocks: 1, layers: 1, heads: 2}
    training: &training
      {steps: 4, batch_size: 8, ema_decay: 0.9, log_every: 2, validate_every: 2, preview_every: 2, checkpoint_every: 2}
  bottom:
    model: {kind: pixelcnn, channels: 8, kernel: 3, layers: 2, output_channels: 8, condition_layers: 1}
    training: *training
sampling: {count: 5, batch_size: 3}
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photographs() -> Path:
    """Return the folder of real photographs, which only some machines have next to the project."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip("this machine has no folder of photographs")
    return PHOTOGRAPHS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MiB, or skip the test if mounting is not permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted on this machine")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="session")
def inception_weights() -> Path:
    """Return random Inception weights, because tests cannot download the real ones."""
    from tests.inception_fixture import weights

    return weights()


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    """Write the tiny config to the temporary folder and return its path."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with every stage except evaluation completed. Tests must not modify it."""
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "tiny.yaml"
    config.write_text(TINY)
    run = folder / "run"
    common = [str(config), "--run", str(run)]
    torch.set_num_threads(1)
    for command in (
        ["train-autoencoder", *common],
        ["extract-codes", *common],
        ["train-prior", *common, "--level", "top"],
        ["train-prior", *common, "--level", "bottom"],
        ["sample", str(run)],
    ):
        assert main(command) == 0
    return run


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of tones: the content is the pitch, the speaker the strength of the second harmonic."""
    soundfile = pytest.importorskip("soundfile")
    folder = tmp_path_factory.mktemp("tones")
    generator = np.random.default_rng(0)
    for content, pitch in {"low": 300, "high": 900}.items():
        for speaker, overtone in {"anna": 0.0, "ben": 0.8}.items():
            for take in range(10):
                time = np.arange(generator.integers(300, 600)) / 8000
                wave = np.sin(2 * np.pi * pitch * time) + overtone * np.sin(4 * np.pi * pitch * time)
                wave = 0.3 * wave + 0.01 * generator.standard_normal(len(time))
                soundfile.write(folder / f"{content}_{speaker}_{take}.wav", wave, 8000, subtype="PCM_16")
    return folder


@pytest.fixture(scope="module")
def app_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Server]":
    """Return a running `vqvae2 app scenes64`. Afterwards, check that it stops without any other output."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from tests.app_browser import start_server, stop_server

    server = start_server(tmp_path_factory.mktemp("app"))
    yield server
    printed = stop_server(server, signal.SIGINT)
    assert printed == "vqvae2: stopped by SIGINT\n", printed  # no traceback, and no warning


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Return a headless Chromium of this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: "Browser", app_server: "Server") -> "Iterator[Callable[[str], Page]]":
    """Return a function that opens a tab of the page. Afterwards, check that no other host was contacted."""
    from tests.app_browser import open_pages

    yield from open_pages(app_server, browser)

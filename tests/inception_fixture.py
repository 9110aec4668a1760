"""Helpers for metric tests: a seeded random Inception network, folders of random images, and two gloo processes."""

import atexit
import contextlib
import io
import multiprocessing
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytorch_fid.fid_score as peer
import scipy.linalg
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from vqvae2.metrics.inception import InceptionFeatures, build_network, load_inception


@cache
def weights() -> Path:
    """Save a random state dict for pytorch-fid's network and return its path.

    The initialization keeps the variance of the features across images. Child processes reuse the file of their parent.
    """
    if found := os.environ.get("RANDOM_INCEPTION"):
        return Path(found)
    folder = Path(tempfile.mkdtemp(prefix="inception-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    network = build_network()
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if isinstance(module, nn.BatchNorm2d):  # non-trivial, so that tests cover folding it into the convolution
            for tensor, low in ((module.weight, 0.8), (module.bias, -0.1), (module.running_mean, -0.1)):
                assert tensor is not None
                tensor.data.uniform_(low, low + 0.3, generator=generator)
    path = folder / "random.pth"
    torch.save(network.state_dict(), path)
    os.environ["RANDOM_INCEPTION"] = str(path)
    return path


@cache
def extractor(dims: int = 2048) -> InceptionFeatures:
    """Return the random network, loaded once per session."""
    return load_inception(weights(), dims)


def fill(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (40, 32), tint: float = 0) -> Path:
    """Write `count` smooth random images of (width, height) `size` and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).astype(float)
        pixels = pixels * (1 - tint) + 255 * tint + rng.normal(0, 8, pixels.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:03d}.png")
    return folder


def pytorch_fid_command(*arguments: str) -> str:
    """Return the output of pytorch-fid's command, run with the random weights instead of the downloaded ones."""

    def sqrtm(matrix: np.ndarray, disp: bool = True) -> Any:  # SciPy 1.18 removed `disp`
        with warnings.catch_warnings(category=scipy.linalg.LinAlgWarning, action="ignore"):  # singular
            root = scipy.linalg.sqrtm(matrix)
        return root if disp else (root, None)

    printed = io.StringIO()
    with (
        mock.patch(
            "pytorch_fid.inception.load_state_dict_from_url", return_value=torch.load(weights(), weights_only=True)
        ),
        mock.patch.object(peer, "linalg", mock.Mock(sqrtm=sqrtm)),
        mock.patch.object(peer, "tqdm", lambda items: items),
        mock.patch("sys.argv", ["pytorch-fid", "--num-workers", "0", "--device", "cpu", *arguments]),
        contextlib.redirect_stdout(printed),
    ):
        peer.main()
    return printed.getvalue()


def two_processes(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function` on two gloo processes and return both results. It must be a module-level function."""
    calls = [process.submit(function, *arguments) for process in _pair()]
    return [call.result(timeout=120) for call in calls]


@cache
def _pair() -> list[ProcessPoolExecutor]:
    """Start two worker processes once per session, because starting them dominates the cost."""
    store = tempfile.mkdtemp(prefix="store-")
    context = multiprocessing.get_context("spawn")
    pair = [
        ProcessPoolExecutor(1, mp_context=context, initializer=_join, initargs=(f"file://{store}/store", rank))
        for rank in range(2)
    ]
    atexit.register(shutil.rmtree, store, ignore_errors=True)
    return pair


def _join(store: str, rank: int) -> None:
    torch.set_num_threads(1)
    # The variables that a launcher sets. The store is a file, so the address is unused.
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())

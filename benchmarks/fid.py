"""FID compared with pytorch-fid: the Fréchet distance at 2048 dimensions, and the whole command on two folders.

    python -m benchmarks.fid                                    # random images
    python -m benchmarks.fid --first A --second B --count 2000  # the first images of two folders

The Inception weights are random, so that nothing has to be downloaded. Time and agreement do not depend on them.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pytorch_fid import fid_score, inception
from torch import nn

from benchmarks.interleaved import time_calls
from vqvae2.__main__ import main as run_vqvae2
from vqvae2.metrics.frechet import frechet_distance
from vqvae2.metrics.inception import build_network

D = 2048


def pytorch_fid_distance(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    """Return pytorch-fid's distance, or NaN if it fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated `disp` of sqrtm, and singular matrices
        try:
            return float(fid_score.calculate_frechet_distance(np.zeros(D), sigma1, np.zeros(D), sigma2))
        except ValueError:
            return float("nan")


def compare_distances(repeats: int) -> None:
    """Print the time and the error relative to closed forms."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((D, D)))[0]

    def commuting(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        return (basis * a) @ basis.T, (basis * b) @ basis.T, float(((np.sqrt(a) - np.sqrt(b)) ** 2).sum())

    def low_rank(count: int) -> tuple[np.ndarray, np.ndarray, float]:
        x, y = (rng.standard_normal((count, D)) * np.arange(1, D + 1) ** -0.5 for _ in "xy")
        x, y = ((side - side.mean(0)) / np.sqrt(count - 1) for side in (x, y))
        overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
        return x.T @ x, y.T @ y, float((x**2).sum() + (y**2).sum() - 2 * overlap)

    decaying = np.logspace(1, -6, D)
    cases = {
        "full rank": commuting(decaying, rng.permutation(decaying)),
        "1000 images each": low_rank(1000),
        "null spaces differ": commuting(
            np.r_[decaying[:900], np.zeros(D - 900)], np.r_[np.zeros(300), decaying[:900], np.zeros(D - 1200)]
        ),
    }
    print(f"Fréchet distance at {D} dimensions, {torch.get_num_threads()} threads, median of {repeats}")
    print(f"{'covariances':20} {'pytorch-fid':>12} {'error':>9} {'vqvae2 fid':>12} {'error':>9} {'ratio':>7}")
    for name, (sigma1, sigma2, exact) in cases.items():
        zero = np.zeros(D)
        ours = time_calls(lambda a=sigma1, b=sigma2, m=zero: frechet_distance(m, a, m, b), repeats)
        theirs = time_calls(lambda a=sigma1, b=sigma2: pytorch_fid_distance(a, b), repeats)
        columns = [f"{timing.median:10.2f} s {abs(timing.value / exact - 1):9.1e}" for timing in (theirs, ours)]
        print(f"{name:20} {' '.join(columns)} {theirs.median / ours.median:6.1f}×")


def random_weights(path: Path) -> None:
    """Write random weights whose features are of order one and differ between images."""
    network = build_network()
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)


def folders(first: Path | None, second: Path | None, count: int, work: Path) -> list[Path]:
    """Create two folders of `count` images each: links to the given images, or random images."""
    made = []
    for number, source in enumerate((first, second)):
        folder = work / str(number)
        folder.mkdir()
        made.append(folder)
        if source:
            files = [file for file in sorted(source.rglob("*")) if file.suffix in (".jpg", ".png")][:count]
            if len(files) < count:
                raise SystemExit(f"{source} has {len(files)} files named *.jpg or *.png, but --count is {count}")
            for index, file in enumerate(files):
                (folder / f"{index:06d}{file.suffix}").symlink_to(file.resolve())
            continue
        rng = np.random.default_rng(number)
        for index in range(count):
            small = Image.fromarray(rng.integers(0, 256 - 60 * number, (8, 8, 3), dtype=np.uint8))
            small.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{index:06d}.png")
    return made


def run_command(which: str, weights: Path, sides: list[Path]) -> dict[str, float]:
    """Run one command in a new process; return `seconds`, `cpu_seconds`, the peak memory `mib`, and the value `fid`."""
    code = [sys.executable, "-m", "benchmarks.fid", "--command", which, "--weights", str(weights), *map(str, sides)]
    lines = subprocess.run(code, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    value = next(float(line.removeprefix("FID:")) for line in lines if line.startswith("FID:"))
    return json.loads(lines[-1]) | {"fid": value}


def command(which: str, weights: Path, sides: list[str]) -> None:
    """Run one command in the child process, and print its time and memory as the last line."""
    started = time.perf_counter()
    if which == "vqvae2":
        run_vqvae2(["fid", "--inception-weights", str(weights), *sides])
    else:
        warnings.simplefilter("ignore")
        inception.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
        sys.argv = ["pytorch-fid", *sides]
        fid_score.main()
    seconds = time.perf_counter() - started
    own, workers = (resource.getrusage(which) for which in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu_seconds = own.ru_utime + own.ru_stime + workers.ru_utime + workers.ru_stime
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "mib": own.ru_maxrss / 1024}))


def compare_commands(first: Path | None, second: Path | None, count: int) -> None:
    """Print the time and memory of both commands with their default options."""
    with tempfile.TemporaryDirectory() as work:
        weights = Path(work, "random.pth")
        random_weights(weights)
        sides = folders(first, second, count, Path(work))
        print(f"\nFID of 2 × {count} images, whole command")
        results = {which: run_command(which, weights, sides) for which in ("pytorch-fid", "vqvae2")}
    for which, result in results.items():
        times = f"{result['seconds']:8.1f} s, {result['cpu_seconds']:8.1f} s of processor time"
        print(f"{which:12} {times} {result['mib']:8.0f} MiB   FID {result['fid']:.8g}")
    theirs, ours = results["pytorch-fid"], results["vqvae2"]
    speedup, cpu_speedup = (theirs[time] / ours[time] for time in ("seconds", "cpu_seconds"))
    difference = abs(ours["fid"] / theirs["fid"] - 1)
    print(f"speedup {speedup:.2f}×, by processor time {cpu_speedup:.2f}×, relative difference of FID {difference:.1e}")


def main() -> None:
    """Run both comparisons, or, in a child process, one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=Path, help="a folder of images of one size, with its subfolders")
    parser.add_argument("--second", type=Path, help="another")
    parser.add_argument("--count", type=int, default=200, help="images a folder; 0 leaves the commands out")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of a distance; 0 leaves them out")
    parser.add_argument("--command", choices=["vqvae2", "pytorch-fid"], help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("sides", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.command:
        command(options.command, options.weights, options.sides)
        return
    if options.repeats:
        compare_distances(options.repeats)
    if options.count:
        compare_commands(options.first, options.second, options.count)


if __name__ == "__main__":
    main()

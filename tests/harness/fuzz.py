"""Corrupt one file at random, run a command that reads it, and check the outcome.

    python -m tests.harness.fuzz [--times 1000] [--seed 0] [--targets store checkpoint …]

The command must exit within a minute, either with status 0 and the same result as before the corruption, or with status
2 and a one-line error without a traceback. After an error, it must succeed once the file is restored. A corrupted input
image may change or remove its own record, but no other. The exit status is 1 if anything else happens.
"""

import argparse
import collections
import importlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.harness.kills import photographs, start, wait
from vqvae2.__main__ import COMMANDS
from vqvae2.data.code_store import CodeStore

CONFIG = """
data: {path: PHOTOGRAPHS, size: 32, labels: folder, val_fraction: 0.2, max_unreadable_fraction: 0.1, num_workers: 0}
autoencoder:
  model:
    channels: 8
    residual_channels: 4
    residual_layers: 1
    levels:
      - {stride: 4, quantizer: {kind: ema, codebook_size: 16, code_dim: 4}}
      - {stride: 2, quantizer: {kind: ema, codebook_size: 300, code_dim: 4}}
  training: {steps: 9, batch_size: 4, log_every: 2, validate_every: 3, preview_every: 9, checkpoint_every: 3}
priors:
  top: &prior
    model: {kind: pixelcnn, channels: 8, kernel: 3, layers: 1, output_channels: 8}
    training: {steps: 9, batch_size: 4, log_every: 2, validate_every: 3, preview_every: 9, checkpoint_every: 3}
  bottom: *prior
sampling: {count: 2}
"""
_TIMEOUT_S = 60
_PATHS = ("config.yaml", "run", "out", "prepared", "grid.png")  # command arguments that are paths in the work folder


class Target(NamedTuple):
    """A kind of file, a command that reads it, and a function that returns the result of the command."""

    files: str  # glob pattern in the work folder
    removed: list[str]  # outputs to remove first, so that the command has work to do
    command: list[str]
    result: Callable[[Path], Any]


def weights(stage: str) -> Callable[[Path], bytes]:
    """Return a function that reads the weights of a stage, the result of training."""
    return lambda work: (work / "run" / stage / "model.safetensors").read_bytes()


def records(work: Path) -> dict[str, bytes]:
    """Return the codes of every image by name, the result of extraction."""
    found = {}
    for split in ("train", "val"):
        store = CodeStore.open(work / "run" / "codes" / split)
        codes, _ = store.read(range(len(store)))
        found |= {
            store.image_name(i): b"".join(level[i].numpy().tobytes() for level in codes) for i in range(len(store))
        }
    return found


def images(work: Path) -> list[bytes]:
    """Return the contents of all sampled images, the result of sampling."""
    return [path.read_bytes() for path in sorted((work / "out" / "images").iterdir())]


_AUTOENCODER = ["train-autoencoder", "config.yaml", "--run", "run"]
_PRIOR = ["train-prior", "config.yaml", "--run", "run", "--level", "top"]
_FINAL = ["run/{}/model.safetensors", "run/{}/checkpoints/00000009"]  # without these, training resumes from step 6
_FINAL_AUTOENCODER = [path.format("autoencoder") for path in _FINAL]
_FINAL_PRIOR = [path.format("prior-top") for path in _FINAL]
_INSPECT = ["inspect", "prepared", "--out", "grid.png"]
TARGETS = {
    "config": Target("config.yaml", [], _AUTOENCODER, weights("autoencoder")),
    "run config": Target("run/config.yaml", ["out"], ["sample", "run", "--out", "out"], images),
    "store": Target("run/codes/*/data.mdb", _FINAL_PRIOR, _PRIOR, weights("prior-top")),
    "seal": Target("run/codes/*/seal.json", _FINAL_PRIOR, _PRIOR, weights("prior-top")),
    "checkpoint": Target("run/autoencoder/checkpoints/*/*", _FINAL_AUTOENCODER, _AUTOENCODER, weights("autoencoder")),
    "metrics": Target("run/autoencoder/metrics.jsonl", _FINAL_AUTOENCODER, _AUTOENCODER, weights("autoencoder")),
    "index": Target("run/data-index.safetensors", _FINAL_AUTOENCODER, _AUTOENCODER, weights("autoencoder")),
    "weights": Target("run/*/model.safetensors", ["out"], ["sample", "run", "--out", "out"], images),
    "prepared": Target("prepared/*", ["grid.png"], _INSPECT, lambda work: (work / "grid.png").read_bytes()),
    "image": Target("photographs/*/*", ["run/codes"], ["extract-codes", "config.yaml", "--run", "run"], records),
}


def corrupt(path: Path, rng: random.Random) -> str:
    """Corrupt a file in one of several ways and return a description."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(["bit", "bit", "bytes", "zeros", "truncated", "extended", "moved", "empty"])
    offset = rng.randrange(max(len(content), 1))
    length = min(rng.choice([1, 8, 512, 4096]), len(content) - offset)
    if kind == "bit" and content:
        content[offset] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        content[offset : offset + length] = rng.randbytes(length)
    elif kind == "zeros":
        content[offset : offset + length] = bytes(length)
    elif kind == "truncated":
        del content[offset:]
    elif kind == "extended":
        content += rng.randbytes(rng.randrange(1, 5000))
    elif kind == "moved":
        content[offset : offset + length] = content[:length]
    else:
        content.clear()
    path.write_bytes(bytes(content))
    return f"{kind} at {offset}"


def run(target: Target, work: Path) -> tuple[int | None, str]:
    """Run the command of a target and return its status (None after a timeout) and its output."""
    log = work / "log"
    log.unlink(missing_ok=True)
    arguments = [str(work / part) if part in _PATHS else part for part in target.command]
    process = start(arguments, log)
    status = wait(process, _TIMEOUT_S)
    return status, log.read_text(errors="replace")


def check(target: Target, name: str, corrupted: Path, work: Path, expected: Any) -> str:
    """Run the command and return "same", "rejected" or "skipped", or the description of a failure."""
    status, printed = run(target, work)
    lines = [line for line in printed.splitlines() if line.startswith("vqvae2: ") and ": warning: " not in line]
    if "Traceback" in printed or status not in (0, 2):
        return f"status {status}\n{printed[-1500:]}"
    if status == 2:
        return "rejected" if len(lines) == 1 else f"{len(lines)} error lines\n{printed[-1500:]}"
    found = target.result(work)
    if name == "image":
        own = str(corrupted.relative_to(work / "photographs"))
        if found == expected:
            return "same"
        expected = {key: value for key, value in expected.items() if key != own}
        return (
            "skipped"
            if {key: value for key, value in found.items() if key != own} == expected
            else "other records differ"
        )
    return "same" if found == expected else "different result"


def prepare(work: Path) -> None:
    """Complete a small run in the work folder."""
    photographs(work / "photographs", 60)
    (work / "config.yaml").write_text(CONFIG.replace("PHOTOGRAPHS", str(work / "photographs")))
    common = [str(work / "config.yaml"), "--run", str(work / "run")]
    for arguments in (
        ["train-autoencoder", *common],
        ["extract-codes", *common],
        ["train-prior", *common, "--level", "top"],
        ["train-prior", *common, "--level", "bottom"],
        ["sample", str(work / "run"), "--out", str(work / "out")],
        [
            "prepare",
            str(work / "photographs"),
            str(work / "prepared"),
            "--size",
            "24",
            "--max-unreadable-fraction",
            "0.1",
        ],
        ["inspect", str(work / "prepared"), "--out", str(work / "grid.png")],
    ):
        status = wait(start(arguments, work / "log"), 10 * _TIMEOUT_S)
        assert status == 0, (work / "log").read_text()


def trial(name: str, base: Path, work: Path, rng: random.Random, expected: Any) -> str:
    """Corrupt one file of a target in a fresh copy of the work folder and return the outcome."""
    target = TARGETS[name]
    shutil.rmtree(work)
    shutil.copytree(base, work)
    for path in target.removed:
        shutil.rmtree(work / path) if (work / path).is_dir() else (work / path).unlink()
    path = rng.choice(sorted(path for path in work.glob(target.files) if path.is_file()))
    content_before = path.read_bytes()
    description = corrupt(path, rng)
    found = check(target, name, path, work, expected)
    if found == "rejected":
        path.write_bytes(content_before)
        after_restore = check(target, name, path, work, expected)
        if after_restore != "same":
            printed = (work / "log").read_text(errors="replace")
            found = f"after restoring the file: {after_restore}\n{printed[-1500:]}"
    if found not in ("same", "rejected", "skipped"):
        print(f"{name}: {path.relative_to(work)}: {description}: {found}", flush=True)
        return "FAILED"
    return found


def main() -> None:
    """Print every failure, and one line per target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1000, help="trials over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    options = parser.parse_args()
    torch.set_num_threads(1)  # forking a multithreaded process is unsafe
    for each in COMMANDS.values():
        importlib.import_module(each.target.partition(":")[0])
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        # All trials use the same path, because artifacts record the path of their data.
        work, base = Path(folder, "work"), Path(folder, "base")
        work.mkdir()
        prepare(work)
        results = {name: TARGETS[name].result(work) for name in options.targets}
        shutil.copytree(work, base)
        for index, name in enumerate(options.targets):
            count = (options.times + index) // len(options.targets)
            rng = random.Random(f"{options.seed} {name}")
            found = collections.Counter(trial(name, base, work, rng, results[name]) for _ in range(count))
            failures += found["FAILED"]
            print(f"{name}: {', '.join(f'{value} {key}' for key, value in sorted(found.items()))}", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()

"""Damages one file at random, runs a command that reads it, and looks at what comes of it.

    python -m tests.harness.fuzz [--times 1000] [--seed 0] [--targets store checkpoint …]

A command must end with status 0 and the result of an undisturbed run, or with status 2 and one line that is no
traceback; never with a signal, and never later than a minute. Where it refused, it must end well once the file is put
back. An image is data, so its own record may become another or be left out, but no other record may. Exit status 1
where anything else happens.
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
_LONGEST_S = 60
_PATHS = ("config.yaml", "run", "out", "prepared", "grid.png")  # words of a command that are below the work folder


class Target(NamedTuple):
    """Files of a kind, and the command that reads them; its result is compared by `result`."""

    files: str  # a pattern under the work folder
    undone: list[str]  # what is removed first, so that the command has something to do
    command: list[str]
    result: Callable[[Path], Any]


def weights(stage: str) -> Callable[[Path], bytes]:
    """What training makes."""
    return lambda work: (work / "run" / stage / "model.safetensors").read_bytes()


def records(work: Path) -> dict[str, bytes]:
    """What extraction makes: the codes of every image by name."""
    found = {}
    for split in ("train", "val"):
        store = CodeStore.open(work / "run" / "codes" / split)
        codes, _ = store.read(range(len(store)))
        found |= {
            store.image_name(i): b"".join(level[i].numpy().tobytes() for level in codes) for i in range(len(store))
        }
    return found


def pictures(work: Path) -> list[bytes]:
    """What sampling makes."""
    return [path.read_bytes() for path in sorted((work / "out" / "images").iterdir())]


_AUTOENCODER = ["train-autoencoder", "config.yaml", "--run", "run"]
_PRIOR = ["train-prior", "config.yaml", "--run", "run", "--level", "top"]
_AGAIN = ["run/{}/model.safetensors", "run/{}/checkpoints/00000009"]  # without these a stage goes on from step 6
_AGAIN_AUTOENCODER = [path.format("autoencoder") for path in _AGAIN]
_AGAIN_PRIOR = [path.format("prior-top") for path in _AGAIN]
_INSPECT = ["inspect", "prepared", "--out", "grid.png"]
TARGETS = {
    "config": Target("config.yaml", [], _AUTOENCODER, weights("autoencoder")),
    "run config": Target("run/config.yaml", ["out"], ["sample", "run", "--out", "out"], pictures),
    "store": Target("run/codes/*/data.mdb", _AGAIN_PRIOR, _PRIOR, weights("prior-top")),
    "seal": Target("run/codes/*/seal.json", _AGAIN_PRIOR, _PRIOR, weights("prior-top")),
    "checkpoint": Target("run/autoencoder/checkpoints/*/*", _AGAIN_AUTOENCODER, _AUTOENCODER, weights("autoencoder")),
    "history": Target("run/autoencoder/metrics.jsonl", _AGAIN_AUTOENCODER, _AUTOENCODER, weights("autoencoder")),
    "index": Target("run/data-index.safetensors", _AGAIN_AUTOENCODER, _AUTOENCODER, weights("autoencoder")),
    "weights": Target("run/*/model.safetensors", ["out"], ["sample", "run", "--out", "out"], pictures),
    "prepared": Target("prepared/*", ["grid.png"], _INSPECT, lambda work: (work / "grid.png").read_bytes()),
    "image": Target("photographs/*/*", ["run/codes"], ["extract-codes", "config.yaml", "--run", "run"], records),
}


def damage(path: Path, chance: random.Random) -> str:
    """Change a file in one of the ways in which files are damaged; what was done, in words."""
    content = bytearray(path.read_bytes())
    kind = chance.choice(["bit", "bit", "bytes", "zeros", "cut", "longer", "moved", "empty"])
    at = chance.randrange(max(len(content), 1))
    length = min(chance.choice([1, 8, 512, 4096]), len(content) - at)
    if kind == "bit" and content:
        content[at] ^= 1 << chance.randrange(8)
    elif kind == "bytes":
        content[at : at + length] = chance.randbytes(length)
    elif kind == "zeros":
        content[at : at + length] = bytes(length)
    elif kind == "cut":
        del content[at:]
    elif kind == "longer":
        content += chance.randbytes(chance.randrange(1, 5000))
    elif kind == "moved":
        content[at : at + length] = content[:length]
    else:
        content.clear()
    path.write_bytes(bytes(content))
    return f"{kind} at {at}"


def run(target: Target, work: Path) -> tuple[int | None, str]:
    """Run a target's command in the work folder; its status, None where it does not end, and what it printed."""
    log = work / "log"
    log.unlink(missing_ok=True)
    arguments = [str(work / part) if part in _PATHS else part for part in target.command]
    process = start(arguments, log)
    status = wait(process, _LONGEST_S)
    return status, log.read_text(errors="replace")


def judge(target: Target, name: str, damaged: Path, work: Path, expected: Any) -> str:
    """What came of it: "same", "refused" or "left out"; anything else is a failure, in words."""
    status, printed = run(target, work)
    lines = [line for line in printed.splitlines() if line.startswith("vqvae2: ") and ": warning: " not in line]
    if "Traceback" in printed or status not in (0, 2):
        return f"status {status}\n{printed[-1500:]}"
    if status == 2:
        return "refused" if len(lines) == 1 else f"{len(lines)} lines\n{printed[-1500:]}"
    found = target.result(work)
    if name == "image":
        own = str(damaged.relative_to(work / "photographs"))
        if found == expected:
            return "same"
        expected = {key: value for key, value in expected.items() if key != own}
        return "left out" if {key: value for key, value in found.items() if key != own} == expected else "other records"
    return "same" if found == expected else "another result"


def prepare(work: Path) -> None:
    """A whole run, small."""
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
        status = wait(start(arguments, work / "log"), 10 * _LONGEST_S)
        assert status == 0, (work / "log").read_text()


def trial(name: str, base: Path, work: Path, chance: random.Random, expected: Any) -> str:
    """Damage one file of a kind in a fresh copy, and judge."""
    target = TARGETS[name]
    shutil.rmtree(work)
    shutil.copytree(base, work)
    for path in target.undone:
        shutil.rmtree(work / path) if (work / path).is_dir() else (work / path).unlink()
    path = chance.choice(sorted(path for path in work.glob(target.files) if path.is_file()))
    whole = path.read_bytes()
    how = damage(path, chance)
    found = judge(target, name, path, work, expected)
    if found == "refused":
        path.write_bytes(whole)
        again = judge(target, name, path, work, expected)
        found = found if again == "same" else f"put back: {again}"
    if found not in ("same", "refused", "left out"):
        print(f"{name}: {path.relative_to(work)}: {how}: {found}", flush=True)
        return "FAILED"
    return found


def main() -> None:
    """Print every failure, and a line for each kind of file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads cannot be forked well
    for each in COMMANDS.values():
        importlib.import_module(each.target.partition(":")[0])
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        # Always in one place, since artefacts name the data that they were made from.
        work, base = Path(folder, "work"), Path(folder, "base")
        work.mkdir()
        prepare(work)
        results = {name: TARGETS[name].result(work) for name in options.targets}
        shutil.copytree(work, base)
        for place, name in enumerate(options.targets):
            count = (options.times + place) // len(options.targets)
            chance = random.Random(f"{options.seed} {name}")
            found = collections.Counter(trial(name, base, work, chance, results[name]) for _ in range(count))
            failures += found["FAILED"]
            print(f"{name}: {', '.join(f'{value} {key}' for key, value in sorted(found.items()))}", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
